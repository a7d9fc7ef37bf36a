"""The instruction prior's schedule in a run: saved with the adapter, and the same after an interruption."""

from __future__ import annotations

import json

import pytest

from qmemtune.engine.interrupt import Interrupted
from qmemtune.engine.run import train

SCHEDULE = (
    "adapter.instruction_prior=1",
    "adapter.instruction_prior_final=0.2",
    "adapter.prior_kl=0.1",
    "adapter.prior_kl_final=0",
    "adapter.prior_schedule_share=0.5",
    "trainer.logging_steps=1",
    "trainer.save_steps=1",
)


def test_values_move_over_their_share_of_the_steps(composed, read_lines, tmp_path):
    train(composed(*SCHEDULE, adapter="queryable"))
    logged = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["event"] == "train"]
    assert [line["instruction_prior"] for line in logged] == pytest.approx([0.6, 0.2, 0.2, 0.2])
    assert [line["prior_kl"] for line in logged] == pytest.approx([0.05, 0, 0, 0])
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["instruction_prior"], saved["prior_progress"]) == (1, 1.0)


def test_an_interrupted_schedule_goes_on_where_it_was(composed, recorder, adapter_bytes, tmp_path):
    slow = (*SCHEDULE, "adapter.prior_schedule_share=1")
    train(composed(*slow, adapter="queryable", run="whole"))

    def stop(step):
        if step == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(composed(*slow, adapter="queryable", run="cut"), progress=recorder(stop))
    train(composed(*slow, "resume=auto", adapter="queryable", run="cut"))
    assert adapter_bytes(tmp_path / "cut" / "adapter") == adapter_bytes(tmp_path / "whole" / "adapter")
