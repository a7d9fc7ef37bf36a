"""Small parts of the engine: step counts, totals, row order, folders, signals, back-ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from qmemtune.config.schema import Config, TrackingConfig
from qmemtune.config.training import OptimizerConfig, TrainerConfig
from qmemtune.engine import arguments, checkpoints, tracking
from qmemtune.engine.environment import describe_environment, seconds_since_start
from qmemtune.engine.folder import open_run, resume_command
from qmemtune.engine.interrupt import ECHO_S, listening
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.rhythm import Due, due_at
from qmemtune.engine.sampler import SeededRandomSampler
from qmemtune.engine.steps import count_steps
from qmemtune.engine.totals import Totals
from qmemtune.errors import UserError
from qmemtune.rundir import RunDir, find_run


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "world", "epochs", "expected"),
    [(10, 4, 1, 1, 1.0, (3, 3)), (10, 4, 2, 1, 2.0, (2, 4)), (10, 2, 1, 2, 1.5, (3, 5)), (1, 8, 4, 1, 1.0, (1, 1))],
)
def test_steps(rows, batch, accumulation, world, epochs, expected):
    trainer = TrainerConfig(
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    steps = count_steps(rows, trainer, OptimizerConfig(warmup_steps=0.5), world_size=world)
    assert (steps.per_epoch, steps.total) == expected
    assert steps.rows_per_step == batch * accumulation * world
    assert steps.warmup == -(-expected[1] // 2)


def test_warm_up_in_steps():
    steps = count_steps(100, TrainerConfig(max_steps=50), OptimizerConfig(warmup_steps=7))
    assert (steps.total, steps.warmup) == (50, 7)


def test_totals_survive_a_checkpoint(tmp_path):
    totals = Totals()
    for seconds in (9.0, 5.0, 1.0, 2.0, 3.0):
        totals.add(loss=2.0, tokens=10, seconds=seconds)
    totals.save(tmp_path)
    again = Totals.load(tmp_path)
    assert again == totals
    assert again.step_s_median == 2.0
    assert again.train_loss == 2.0
    assert again.tokens_per_s == 30 / 6  # without the two steps that warm up
    totals = Totals()
    totals.add(loss=2.0, tokens=10, seconds=4.0)
    assert totals.tokens_per_s == 10 / 4
    assert again.take_window().steps == 5
    assert again.take_window().steps == 0


def test_row_order_depends_on_seed_and_epoch_only():
    sampler = SeededRandomSampler(50, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first
    assert sorted(first) == list(range(50))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(SeededRandomSampler(50, seed=4)) != first


def test_intervals():
    config = Config()
    config.evaluation.every_steps = 4
    config.evaluation.exact_match.every_steps = 6
    config.evaluation.samples.every_steps = 3
    assert due_at(6, config) == Due(loss=False, exact_match=False, samples=True)
    config.evaluation.exact_match.enabled = True
    assert due_at(6, config) == Due(loss=False, exact_match=True, samples=True)
    assert due_at(12, config) == Due(loss=True, exact_match=True, samples=True)
    assert not due_at(5, config)


def test_truncate_drops_later_and_broken_lines(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan")})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.truncate(2)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None},
    ]


def test_only_complete_checkpoints_count(tmp_path):
    for step in (2, 10, 9):
        written = checkpoints.begin(tmp_path) / f"checkpoint-{step}"
        written.mkdir()
        (written / "file").write_text("x")
        checkpoints.complete(written, tmp_path, {"step": step, "world_size": 1, "rows_per_step": 8})
    (tmp_path / "checkpoint-11").mkdir()
    assert [c.step for c in checkpoints.complete_checkpoints(tmp_path)] == [2, 9, 10]
    checkpoints.rotate(tmp_path, 2, newest=tmp_path / "checkpoint-10")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    assert checkpoints.remove_later(tmp_path, 9) == [tmp_path / "damaged-checkpoint-11"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-9", "damaged-checkpoint-11"]


def test_resume_needs_a_run():
    config = Config()
    config.resume.path = "auto"
    with pytest.raises(UserError, match="which run"):
        open_run(config)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert open_run(Config(run_dir="~/run")).run.path == tmp_path / "run"
    written = checkpoints.begin(tmp_path / "run" / "checkpoints") / "checkpoint-2"
    written.mkdir()
    (written / "file").write_text("x")
    checkpoints.complete(written, tmp_path / "run" / "checkpoints", {"step": 2, "world_size": 1, "rows_per_step": 8})
    (tmp_path / "run" / "config.yaml").touch()
    config = Config()
    config.resume.path = "~/run/checkpoints/checkpoint-2"
    opened = open_run(config)
    assert opened.checkpoint is not None
    assert opened.run.path == find_run("~/run").path == tmp_path / "run"


def test_resume_command_is_one_a_shell_takes():
    argv = ["/bin/qmemtune", "train", "recipe=a b", "run_dir=old", "resume=auto", "--json"]
    assert resume_command(argv, RunDir(Path("runs/x"))) == (
        "qmemtune train 'recipe=a b' --json run_dir=runs/x resume=auto"
    )
    assert resume_command(["pytest"], RunDir(Path("r"))) == "qmemtune train run_dir=r resume=auto"


def test_several_gpus_in_one_process_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="2 GPUs"):
        arguments.refuse_data_parallel()
    monkeypatch.setenv("LOCAL_RANK", "0")
    arguments.refuse_data_parallel()


def test_a_missing_backend_names_the_extra(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"qmemtune\[tracking\]"):
        tracking.check_backends(TrackingConfig(backends=["wandb"]))


def test_a_run_folder_cannot_lie_in_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="which is a file"):
        open_run(Config(run_dir=str(tmp_path / "file" / "a" / "run")))


@pytest.mark.parametrize(
    ("environment", "project", "expected"),
    [
        (None, "qmemtune", "qmemtune"),
        ("theirs", "qmemtune", "theirs"),
        ("theirs", "mine", "mine"),
        (None, "mine", "mine"),
    ],
)
def test_a_project_is_the_configs_then_the_environments(monkeypatch, tmp_path, environment, project, expected):
    monkeypatch.setattr(tracking, "_set_here", set())
    monkeypatch.setenv("WANDB_DIR", "x")
    monkeypatch.setenv("WANDB_PROJECT", environment or "")
    if environment is None:
        monkeypatch.delenv("WANDB_PROJECT")
    tracking.use_folder(TrackingConfig(backends=["wandb"], project=project), RunDir(tmp_path))
    assert os.environ["WANDB_PROJECT"] == expected
    assert os.environ["WANDB_DIR"] == "x"


def test_a_later_run_of_the_same_process_has_its_own_project_and_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "_set_here", set())
    monkeypatch.setenv("WANDB_DIR", "")
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.setenv("WANDB_PROJECT", "")
    monkeypatch.delenv("WANDB_PROJECT")
    for project in ("first", "qmemtune"):
        tracking.use_folder(TrackingConfig(backends=["wandb"], project=project), RunDir(tmp_path / project))
        assert os.environ["WANDB_PROJECT"] == project
        assert os.environ["WANDB_DIR"] == str(tmp_path / project / "tracking")


def test_the_first_signal_asks_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with listening() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_listens_to_nothing():
    found = []

    def run() -> None:
        with listening() as request:
            found.append(bool(request))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_second_signal_leaves_at_once_and_an_echo_is_none():
    code = (
        "import os, signal, time\n"
        "from qmemtune.engine.interrupt import listening\n"
        "with listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        f"    time.sleep({ECHO_S * 1.2})\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('too late', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout == "still here\n"


def test_the_environment_is_json():
    facts = json.loads(json.dumps(describe_environment(seed=3, world_size=1, dtype=torch.float32)))
    assert facts["seed"] == 3
    assert facts["versions"]["transformers"]
    assert facts["threads"] >= 1
    assert seconds_since_start() > 0


def test_a_tilde_in_the_run_folder_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config()
    config.run_dir = "~/runs/a"
    assert open_run(config).run.path == tmp_path / "runs" / "a"
