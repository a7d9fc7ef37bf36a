"""Signals to real processes: preemption with a time limit, and a second signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qmemtune.config.dump import to_yaml
from qmemtune.engine.checkpoints import complete_checkpoints, found_checkpoints
from qmemtune.engine.compare import different_files, logged_lines
from qmemtune.engine.run import train
from qmemtune.rundir import RunDir

LIMIT_S = 30
"""Between SIGTERM and SIGKILL, as schedulers of preemptible machines have it."""


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_sigterm_saves_the_step_in_time_and_the_run_goes_on_exactly(composed, tmp_path):
    options = ("trainer.max_steps=400", "trainer.logging_steps=7", "trainer.save_total_limit=9")
    (tmp_path / "conf.yaml").write_text(to_yaml(composed(*options, run="halves").config))
    command = [sys.executable, "-c", "import sys; from qmemtune.cli.app import main; sys.exit(main())", "train"]
    halves = RunDir(tmp_path / "halves")
    process = subprocess.Popen(
        [*command, f"recipe={tmp_path / 'conf.yaml'}", "--quiet"], stderr=subprocess.PIPE, cwd=tmp_path, text=True
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
