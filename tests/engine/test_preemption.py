"""Signals to real processes: preemption with a time limit, a second signal, signals to all processes of a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qmemtune.config.dump import to_yaml
from qmemtune.engine.checkpoints import complete_checkpoints, found_checkpoints
from qmemtune.engine.compare import different_files, logged_lines
from qmemtune.engine.interrupt import listening
from qmemtune.engine.run import train
from qmemtune.rundir import RunDir

LIMIT_S = 30
"""Between SIGTERM and SIGKILL, as schedulers of preemptible machines have it."""
COMMAND = [sys.executable, "-c", "import sys; from qmemtune.cli.app import main; sys.exit(main())", "train"]


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_sigterm_saves_the_step_in_time_and_the_run_goes_on_exactly(composed, tmp_path):
    options = ("trainer.max_steps=400", "trainer.logging_steps=7", "trainer.save_total_limit=9")
    (tmp_path / "conf.yaml").write_text(to_yaml(composed(*options, run="halves").config))
    halves = RunDir(tmp_path / "halves")
    process = subprocess.Popen(
        [*COMMAND, f"recipe={tmp_path / 'conf.yaml'}", "--quiet"], stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    try:
        wait_for(lambda: process.poll() is not None or len(logged_lines(halves.metrics)) > 1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "resume=auto" in err
    (checkpoint,) = complete_checkpoints(halves.checkpoints)
    assert 7 < checkpoint.step < 400
    # The same steps without a signal, by a run that pauses a few steps later, as the resumed one does.
    later = checkpoint.step + 3
    train(composed(*options, run="whole"), until=later)
    train(composed(*options, "resume=auto", run="halves"), until=later)
    whole = RunDir(tmp_path / "whole")
    assert different_files(whole.checkpoints / f"checkpoint-{later}", halves.checkpoints / f"checkpoint-{later}") == []
    assert logged_lines(whole.metrics) == logged_lines(halves.metrics)


def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_is_whole(composed, recorder, tmp_path):
    run, here = RunDir(tmp_path / "run"), tmp_path / "here"
    config = composed("trainer.max_steps=4", "trainer.save_steps=2")

    def hang(step: int) -> None:
        if step == 3:
            here.touch()
            time.sleep(600)

    process = os.fork()
    if process == 0:
        try:
            train(config, progress=recorder(hang))
        finally:
            os._exit(1)
    try:
        wait_for(here.exists)
        os.kill(process, signal.SIGINT)
        time.sleep(0.2)
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        began = time.monotonic()
        os.kill(process, signal.SIGTERM)
        _, status = os.waitpid(process, 0)
    finally:
        if not here.exists():
            os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(status) == 143
    assert time.monotonic() - began < 10
    assert [checkpoint.step for checkpoint in complete_checkpoints(run.checkpoints)] == [2]
    assert [path.name for path in found_checkpoints(run.checkpoints)] == ["checkpoint-2"]
    assert train(composed("trainer.max_steps=4", "trainer.save_steps=2", "resume=auto"))["steps"] == 4
    assert Path(run.summary).is_file()


def start(composed, tmp_path: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run in a process group of its own, after its first steps, and the processes that load its rows."""
    options = (
        "trainer.max_steps=4000",
        "trainer.num_workers=2",
        "trainer.logging_steps=3",
        "trainer.per_device_train_batch_size=1",
    )
    (tmp_path / "conf.yaml").write_text(to_yaml(composed(*options).config))
    process = subprocess.Popen(
        [*COMMAND, f"recipe={tmp_path / 'conf.yaml'}", "--quiet"],
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        start_new_session=True,
    )
    loading: list[psutil.Process] = []

    def loads() -> bool:
        # Others take their place with each epoch.
        loading[:] = psutil.Process(process.pid).children() if process.poll() is None else []
        return len(loading) == 2 and len(logged_lines(RunDir(tmp_path / "run").metrics)) > 1

    try:
        wait_for(lambda: process.poll() is not None or loads())
        assert process.poll() is None, process.communicate()[1]
    except BaseException:
        process.kill()
        raise
    return process, loading


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_the_step(composed, tmp_path, signum):
    process, _ = start(composed, tmp_path)
    try:
        # As `timeout` does: the process, and then its group with it.
        os.kill(process.pid, signum)
        os.killpg(process.pid, signum)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signum, err
    assert "resume=auto" in err
    (checkpoint,) = complete_checkpoints(RunDir(tmp_path / "run").checkpoints)
    assert f"stopped at step {checkpoint.step} of 4000" in err


@pytest.mark.slow
def test_processes_that_load_rows_do_not_outlive_a_killed_run(composed, tmp_path):
    process, loading = start(composed, tmp_path)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(loading, timeout=LIMIT_S)
    for left in alive:
        left.kill()
    assert alive == []


def test_only_the_main_process_ends_one_that_loads_rows():
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def load() -> None:
        begun.set()
        time.sleep(60)

    with listening():
        process = context.Process(target=load)
        process.start()
        assert begun.wait(10)
        for signum in ("TERM", "INT", "TERM", "INT"):
            subprocess.run(["kill", f"-{signum}", str(process.pid)], check=True)
        process.join(0.5)
        assert process.is_alive()
        process.terminate()
        process.join(10)
    assert process.exitcode == 0
