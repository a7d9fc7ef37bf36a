"""A disk that takes no more: the run goes on, keeps what is whole, says what is missing and fails at its end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmemtune.cli.app import main
from qmemtune.engine.checkpoints import complete_checkpoints
from qmemtune.engine.interrupt import Interrupted
from qmemtune.engine.run import train
from qmemtune.errors import RunFailed, write_failure

resource = pytest.importorskip("resource", reason="limits on file sizes are POSIX's")
EACH = ("trainer.save_steps=1", "trainer.save_total_limit=9", "trainer.logging_steps=1")


class Disk:
    """The limit on a file's size stands in for a full disk: writing fails in the same places."""

    def __init__(self) -> None:
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def is_full(self, largest_file: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, self.hard))

    def has_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))


@pytest.fixture
def disk() -> Iterator[Disk]:
    limits = Disk()
    yield limits
    limits.has_room()


def full_at(disk: Disk, steps: set[int], largest_file: int):
    return lambda step: disk.is_full(largest_file) if step in steps else disk.has_room()


def test_a_checkpoint_that_finds_no_room_is_left_out(composed, recorder, adapter_bytes, disk):
    whole = train(composed(*EACH, run="whole"))
    progress = recorder(full_at(disk, {2, 3}, 8_000))
    with pytest.raises(RunFailed, match="checkpoint-2: File too large") as failed:
        train(composed(*EACH), progress=progress)
    assert failed.value.exit_code == 1
    assert len(failed.value.findings) == 2
    run = Path(failed.value.findings[0].where)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run / "checkpoints")] == [1, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-4"]
    assert sum("checkpoint-2 could not be written" in message for message in progress.messages) == 1
    assert progress.steps == [1, 2, 3, 4]
    assert adapter_bytes(run / "adapter") == adapter_bytes(Path(whole["adapter"]))
    assert len(json.loads((run / "summary.json").read_text())["not_written"]) == 2


def test_lines_that_find_no_room_are_counted_and_leave_no_halves(composed, recorder, read_lines, disk):
    metrics = []

    def steps(step: int) -> None:
        if step == 2:
            (file,) = metrics
            disk.is_full(file.stat().st_size + 10)
        else:
            disk.has_room()
            metrics[:] = [Path(made.config.run_dir) / "metrics.jsonl"]

    made = composed("trainer.logging_steps=1", "evaluation.at_end=false", "trainer.save_steps=4")
    with pytest.raises(RunFailed, match=r"metrics.jsonl \(lines: 1\)"):
        train(made, progress=recorder(steps))
    lines = read_lines(metrics[0])
    assert [line["step"] for line in lines] == [1, 3, 4]


def test_what_the_end_could_not_write_is_written_by_resuming(composed, recorder, adapter_bytes, disk):
    whole = train(composed(*EACH, run="whole"))
    with pytest.raises(RunFailed, match="adapter: ") as failed:
        train(composed(*EACH), progress=recorder(full_at(disk, {4}, 8_000)))
    disk.has_room()
    run = Path(failed.value.findings[0].where)
    assert not (run / "summary.json").exists()
    assert not list(run.glob("adapter*"))
    assert [checkpoint.step for checkpoint in complete_checkpoints(run / "checkpoints")] == [1, 2, 3]
    summary = train(composed(*EACH, "resume=auto"))
    assert summary["not_written"] == []
    assert adapter_bytes(run / "adapter") == adapter_bytes(Path(whole["adapter"]))


def test_an_interrupted_run_does_not_claim_a_checkpoint_it_could_not_write(composed, recorder, disk):
    import signal

    def stop(step: int) -> None:
        if step == 2:
            disk.is_full(8_000)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="could not be written"):
        train(composed(*EACH), progress=recorder(stop))


def test_an_export_without_room_leaves_nothing(composed, disk, capsys):
    summary = train(composed())
    folder = Path(summary["run_dir"])
    disk.is_full(20_000)
    assert main(["merge-export", f"run_dir={folder}", "export.fidelity=false"]) == 1
    disk.has_room()
    said = capsys.readouterr().err
    assert "error: a file could not be written: File too large" in said
    assert "free some space" in said
    assert not list((folder / "export").iterdir())


def test_other_errors_are_not_taken_for_a_full_disk():
    assert write_failure(FileNotFoundError(2, "No such file or directory")) is None
    assert write_failure(RuntimeError("CUDA error: out of memory")) is None
    assert write_failure(ValueError("No space left on device")) is None
    assert write_failure(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"))


@pytest.mark.slow  # starts the real command, with a file system of its own
def test_a_file_system_that_fills_up(composed, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    try_out = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(mount)]
    if shutil.which("unshare") is None or subprocess.run(try_out, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    config = composed(*EACH).config
    overrides = [f"model.path={config.model.path}", f"data.path={config.data.path}", "adapter.r=16", *EACH]
    train_line = [sys.executable, "-m", "qmemtune", "train", *overrides, "trainer.max_steps=12", f"run_dir={mount}/run"]
    script = (
        'mount -t tmpfs -o size=4m tmpfs "$1"; shift; "$@"; echo "code $?"; '
        f"ls -A {mount}/run/checkpoints; ls {mount}/run/adapter; tail -n 1 {mount}/run/metrics.jsonl"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(mount), *train_line],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "code 1" in done.stdout, done.stderr
    assert "checkpoint-12 could not be written" in done.stderr
    assert "checkpoint-1\n" in done.stdout
    assert ".writing" not in done.stdout
    assert "Traceback" not in done.stderr
