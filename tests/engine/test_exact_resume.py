"""A run that dies without a word at any point and is resumed is the undisturbed one, logs and evaluations included.

benchmarks/crash.py does the same with SIGKILL, at random moments and more often.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qmemtune.engine import checkpoints
from qmemtune.engine.checkpoints import complete_checkpoints
from qmemtune.engine.compare import different_files, logged_lines, without_times
from qmemtune.engine.run import train
from qmemtune.engine.trainer import RunTrainer
from qmemtune.models import hardware
from qmemtune.rundir import RunDir, read_json

BASE = (
    "trainer.gradient_accumulation_steps=2", "trainer.max_steps=8", "trainer.logging_steps=3", "trainer.save_steps=2",
    "evaluation.every_steps=2", "evaluation.samples.every_steps=3", "evaluation.samples.count=1",
    "evaluation.samples.max_new_tokens=2",
)  # fmt: skip


class DiedError(BaseException):
    """Nothing catches it, so that nothing is cleaned up."""


def same(whole: Path, run: Path) -> None:
    first, second = RunDir(whole), RunDir(run)
    pairs = [complete_checkpoints(folder.checkpoints) for folder in (first, second)]
    assert [c.step for c in pairs[0]] == [c.step for c in pairs[1]]
    for one, other in zip(*pairs, strict=True):
        assert different_files(one.path, other.path) == []
    assert different_files(first.adapter, second.adapter) == []
    for one_log, other_log in zip(first.logs, second.logs, strict=True):
        assert logged_lines(one_log) == logged_lines(other_log)
    for key in ("eval", "train_loss", "tokens", "best_step", "final_step", "stopped_early"):
        assert without_times(read_json(first.summary)[key]) == without_times(read_json(second.summary)[key])


@pytest.mark.parametrize(
    ("adapter", "step", "options"),
    [
        ("lora", 7, ("trainer.packing=true", "data.max_length=48", "quantization=nf4", "model.compute_dtype=bfloat16")),
        ("lora", 5, ("~data.path", "data.sources.a.path={rows}", "data.sources.a.weight=2", "trainer.keep_best=true")),
        (
            "queryable",
            5,
            ("adapter.instruction_prior=1", "adapter.instruction_prior_final=0", "adapter.prior_kl=0.1",
             "adapter.dropout=0.2", "trainer.route_stats_steps=2"),
        ),
    ],
)  # fmt: skip
def test_a_run_that_died_at_a_step(composed, recorder, rows_file, tmp_path, adapter, step, options):
    def die(now: int) -> None:
        if now == step:
            raise DiedError

    overrides = (*BASE, *(option.format(rows=rows_file) for option in options))
    train(composed(*overrides, adapter=adapter, run="whole"))
    with pytest.raises(DiedError):
        train(composed(*overrides, adapter=adapter), progress=recorder(die))
    train(composed(*overrides, "resume=auto", adapter=adapter))
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "where", ["while saving", "before the name", "after the last checkpoint", "before the summary"]
)
def test_a_run_that_died_beside_its_steps(composed, monkeypatch, tmp_path, where):
    target, name, call = {
        "while saving": (checkpoints, "onto_disk", 20),
        "before the name": (Path, "rename", 2),
        "after the last checkpoint": (RunTrainer, "finish", 0),
        "before the summary": (RunTrainer, "save_model", 4),
    }[where]
    real, calls = getattr(target, name), iter(range(1000))

    def die(*arguments, **options):
        if next(calls) == call:
            raise DiedError
        return real(*arguments, **options)

    train(composed(*BASE, run="whole"))
    killed = composed(*BASE)
    with monkeypatch.context() as patched:
        patched.setattr(target, name, die)
        with pytest.raises(DiedError):
            train(killed)
    train(composed(*BASE, "resume=auto"))
    same(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_stopped_early_stays_stopped(composed, monkeypatch, tmp_path):
    options = (*BASE, "trainer.early_stopping_patience=1", "optimizer.learning_rate=1e-9", "trainer.max_steps=20")
    options = (*options, "evaluation.max_rows=3")
    train(composed(*options, run="whole"))
    assert read_json(RunDir(tmp_path / "whole").summary)["stopped_early"]
    killed = composed(*options)
    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "finish", lambda self: (_ for _ in ()).throw(DiedError()))
        with pytest.raises(DiedError):
            train(killed)
    train(composed(*options, "resume=auto"))
    same(tmp_path / "whole", tmp_path / "run")


def test_a_resumed_run_computes_in_the_type_it_began_with(composed, recorder, monkeypatch, tmp_path):
    """What is fast is measured, and a busy machine measures otherwise."""
    options = ("model.compute_dtype=auto", "trainer.max_steps=2", "trainer.save_steps=1", "evaluation.at_end=false")
    monkeypatch.setattr(hardware, "bf16_is_fast", lambda device: True)
    train(composed(*options), until=1)
    monkeypatch.setattr(hardware, "bf16_is_fast", lambda device: False)
    progress = recorder()
    train(composed(*options, "resume=auto"), progress=progress)
    assert progress.started[0][1]["dtype"] == "bfloat16"
    leftover = tmp_path / "run" / "adapter.tmp"
    leftover.mkdir()
    (leftover / ".half").write_text("written")
    train(composed(*options, "resume=auto"))
    assert not (tmp_path / "run" / "adapter" / ".half").exists()
