"""Run folders, checkpoints and adapters of the first format load; those of a newer one are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qmemtune.cli.app import main
from qmemtune.config.of_run import load_resolved
from qmemtune.engine.checkpoints import checked
from qmemtune.engine.restore import load_run
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.rundir import FORMAT_FILE, RunDir, find_run

STORED = Path(__file__).with_name("stored_format_1") / "run"
"""A run of the first format that was stopped after a checkpoint of step 2 of 4; its adapter is that of its end."""


@pytest.fixture
def old(tmp_path: Path) -> RunDir:
    shutil.copytree(STORED, tmp_path / "run")
    return RunDir(tmp_path / "run")


def options(rows_file: Path, tiny_llama_dir: Path) -> list[str]:
    return [f"model.path={tiny_llama_dir}", f"data.path={rows_file}"]


def test_an_old_run_goes_on(old, composed, recorder, read_lines):
    same = ("adapter.r=2", "adapter.num_atoms=2", "adapter.key_dim=2", "adapter.target_modules=[q_proj]")
    same = (*same, *(f"adapter.{name}=false" for name in ("router_norm", "center_cores", "center_queries")))
    with pytest.raises(UserError, match="center_queries=False"):
        train(composed(*same[:4], "resume=auto", adapter="queryable"))
    checkpoint = checked(old.checkpoints / "checkpoint-2")
    assert (checkpoint.format, checkpoint.step) == (1, 2)
    progress = recorder()
    train(composed(*same, "resume=auto", adapter="queryable"), progress=progress)
    assert progress.steps == [3, 4]
    assert any("does not say what it was made with" in message for message in progress.messages)
    # The tiny model is random, but the same everywhere.
    logged = [line["loss"] for line in read_lines(old.metrics) if line["event"] == "train"]
    stored = [line["loss"] for line in read_lines(STORED / "metrics.jsonl") if line["event"] == "train"]
    assert logged == pytest.approx(stored, rel=1e-4)
    went_on = checked(old.checkpoints / "checkpoint-4")
    assert (went_on.format, went_on.row_order) == (2, 1)


def test_an_old_run_and_its_adapter_load(old, rows_file, tiny_llama_dir):
    run = find_run(old.path)
    composed = load_resolved(run.config, options(rows_file, tiny_llama_dir))
    assert composed.config.resume.path is None
    loaded = load_run(run, composed.config)
    assert loaded.model.peft_config["default"].router_norm is False


def test_damage_to_an_old_checkpoint_shows_in_sizes(old):
    (old.checkpoints / "checkpoint-2" / "optimizer.pt").write_bytes(b"short")
    with pytest.raises(UserError, match=r"optimizer\.pt has 5 of"):
        checked(old.checkpoints / "checkpoint-2")


def test_newer_formats_are_refused_with_what_to_upgrade(composed, rows_file, tiny_llama_dir, capsys):
    summary = train(composed("trainer.max_steps=1", "evaluation.at_end=false"))
    run = RunDir(Path(summary["run_dir"]))
    newer = {"format": 99, "qmemtune": "77.0"}
    for folder in (run.adapter, run.path):
        assert json.loads((folder / FORMAT_FILE).read_text())["format"] == 2
        (folder / FORMAT_FILE).write_text(json.dumps(newer))
        assert main(["eval", f"run_dir={run.path}", *options(rows_file, tiny_llama_dir)]) == 2
        message = capsys.readouterr().err
        assert "format 99" in message
        assert "upgrade qmemtune to 77.0 or later" in " ".join(message.split())
    with pytest.raises(UserError, match="run folder has format 99"):
        train(composed("resume=auto"))
