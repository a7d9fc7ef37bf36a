"""What happens beside a run: a second run in its folder, back-ends that fail, data files that change."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data.changes import WatchedFiles
from qmemtune.engine.lock import in_use, refuse_if_in_use
from qmemtune.engine.plan import plan
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.rundir import RunDir, new_run_path


def test_a_second_run_in_the_folder_is_refused(composed, recorder):
    def second(step: int) -> None:
        for overrides in ((), ("resume=auto",)):
            with pytest.raises(UserError, match="another process trains into this folder") as error:
                plan(composed(*overrides))
            assert error.value.exit_code == 2

    run = RunDir(Path(train(composed(), progress=recorder(second))["run_dir"]))
    refuse_if_in_use(run)
    run.summary.unlink()
    shutil.rmtree(run.checkpoints)
    before = sorted(path.name for path in run.path.iterdir())
    with in_use(run), pytest.raises(UserError, match="another process trains into this folder"):
        train(composed())
    assert sorted(path.name for path in run.path.iterdir()) == before


HOLD = """
import sys, time
from pathlib import Path
from qmemtune.engine.lock import in_use
from qmemtune.rundir import RunDir
with in_use(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_holds_nothing(tmp_path):
    run = RunDir(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process"):
        refuse_if_in_use(run)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_if_in_use(run)
    with in_use(run), pytest.raises(UserError, match="another process"), in_use(run):
        pass
    with in_use(run):
        pass


def test_runs_of_one_second_take_different_folders(tmp_path, composed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 1, 1)
    names = [new_run_path("r", tmp_path / "runs", now, make=True).name for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]
    # A run that cannot start leaves no folder of its own behind.
    with pytest.raises(UserError):
        train(composed("~run_dir", "adapter.target_modules=[no_such_layer]"))
    assert not list((tmp_path / "runs" / "custom").iterdir())


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_a_back_end_that_fails_does_not_stop_training(composed, recorder, adapter_bytes, monkeypatch, event):
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    plain = train(composed(run="plain"))

    def fail(self, *args, **kwargs):
        raise ConnectionError("the service\nis away")

    monkeypatch.setattr(TensorBoardCallback, event, fail)
    progress = recorder()
    summary = train(composed("tracking.backends=[tensorboard]", "trainer.logging_steps=1"), progress=progress)
    said = [message for message in progress.messages if "tensorboard" in message]
    assert len(said) == 1
    assert "ConnectionError: the service is away" in said[0]
    assert summary["eval"]["loss"] == plain["eval"]["loss"]
    assert adapter_bytes(Path(summary["adapter"])) == adapter_bytes(Path(plain["adapter"]))


def test_a_data_file_that_changes_is_noticed(composed, recorder, adapter_bytes, rows_file, tmp_path, read_lines):
    plain = train(composed(run="plain"))
    copy = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, copy)

    def change(step: int) -> None:
        if step == 2:
            copy.write_text("{}\n")

    progress = recorder(change)
    summary = train(composed(f"data.path={copy}"), progress=progress)
    assert [message for message in progress.messages if f"{copy} changed after its rows were read" in message]
    warnings = [line for line in read_lines(Path(summary["run_dir"]) / "metrics.jsonl") if line["event"] == "warning"]
    assert len(warnings) == 1
    assert adapter_bytes(Path(summary["adapter"])) == adapter_bytes(Path(plain["adapter"]))


def test_the_held_out_file_of_a_folder_is_watched(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.jsonl"):
        (tmp_path / name).write_text("x")
    watched = WatchedFiles(DataConfig(path=str(tmp_path), eval_split="test"))
    assert sorted(path.name for path in watched.states) == ["test.jsonl", "train.jsonl"]


def test_every_local_file_of_a_config_is_watched(tmp_path):
    for name in ("a.jsonl", "b.csv", "folder/c.jsonl", "held.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    sources = {
        "one": SourceConfig(path=f"{tmp_path}/*.csv"),
        "two": SourceConfig(path=f"{tmp_path}/folder"),
        "three": SourceConfig(path="generated:word_lists"),
        "four": SourceConfig(path="org/hub"),
        "five": SourceConfig(path=f"{tmp_path}/gone.jsonl"),
    }
    watched = WatchedFiles(DataConfig(sources=sources, eval_path=f"{tmp_path}/held.jsonl"))
    assert sorted(path.name for path in watched.states) == ["b.csv", "c.jsonl", "held.jsonl"]
    assert watched.changed(now=True) == []
    (tmp_path / "held.jsonl").unlink()
    os.utime(tmp_path / "b.csv", ns=(1, 1))
    assert watched.changed() == []  # looked at just before
    assert sorted(path.name for path in watched.changed(now=True)) == ["b.csv", "held.jsonl"]
    assert watched.changed(now=True) == []
