"""trainer.profile: a trace and the costliest operations."""

from __future__ import annotations

import json

from qmemtune.engine.run import train


def test_a_profile_is_printed_and_written_and_changes_nothing(composed, recorder, adapter_bytes, tmp_path):
    news = recorder()
    made = composed("trainer.max_steps=8", "trainer.profile=true", run="profiled")
    train(made, progress=news)
    lines = [line for line in news.messages if "ms a step" in line]
    assert len(lines) == 10
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100
    trace = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])

    train(composed("trainer.max_steps=8", run="plain"))
    assert not (tmp_path / "plain" / "profile.json").exists()
    assert adapter_bytes(tmp_path / "plain" / "adapter") == adapter_bytes(tmp_path / "profiled" / "adapter")


def test_a_run_too_short_for_a_profile_says_so(composed, recorder):
    news = recorder()
    train(composed("trainer.max_steps=3", "trainer.profile=true"), progress=news)
    assert any("no profile" in line and "7" in line for line in news.messages)
