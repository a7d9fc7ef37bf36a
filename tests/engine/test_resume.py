"""A run that is stopped and resumed ends as the undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qmemtune.engine.checkpoints import complete_checkpoints
from qmemtune.engine.folder import open_run
from qmemtune.engine.interrupt import Interrupted
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.rundir import RunDir

# 21 training rows, 3 a batch, 2 batches a step: 4 steps an epoch, the last one of a single batch.
HARD = (
    "trainer.gradient_accumulation_steps=2",
    "trainer.length_grouping=true",
    "trainer.max_steps=8",
    "trainer.logging_steps=3",
    "trainer.save_steps=3",
    "trainer.save_total_limit=10",
)


def stop_at(step: int, signum: int = signal.SIGINT):
    return lambda now: os.kill(os.getpid(), signum) if now == step else None


@pytest.mark.parametrize(
    ("adapter", "step", "extra"),
    [
        ("lora", 2, ()),
        ("lora", 4, ()),  # the end of an epoch
        ("lora", 6, ("trainer.length_grouping=false", "trainer.num_workers=0")),
        ("lora", 6, ("trainer.padding_free=false",)),
        ("lora", 6, ("optimizer.name=adamw_8bit", "quantization=nf4")),
        ("queryable", 6, ("adapter.instruction_prior=0.5", "adapter.prior_kl=0.1")),
    ],
)
def test_stop_and_resume_changes_nothing(composed, recorder, adapter_bytes, read_lines, adapter, step, extra):
    whole = train(composed(*HARD, *extra, adapter=adapter, run="whole"))
    overrides = (*HARD, *extra)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 8") as stopped:
        train(composed(*overrides, adapter=adapter, run="halves"), progress=recorder(stop_at(step)))
    assert stopped.value.exit_code == 130
    assert "resume=auto" in str(stopped.value)
    progress = recorder()
    resumed = train(composed(*overrides, "resume=auto", adapter=adapter, run="halves"), progress=progress)
    assert progress.steps == list(range(step + 1, 9))
    assert progress.started[0][1]["first_step"] == step
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["tokens"] == whole["tokens"]
    assert resumed["eval"]["loss"] == whole["eval"]["loss"]

    def without_times(summary):
        lines = read_lines(Path(summary["run_dir"]) / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "seconds")} for line in lines]

    assert without_times(resumed) == without_times(whole)


def test_resume_after_a_crash_drops_later_lines_and_checkpoints(composed, recorder, adapter_bytes, read_lines):
    class CrashedError(Exception):
        pass

    def crash(step: int) -> None:
        if step == 6:
            raise CrashedError

    overrides = (*HARD, "trainer.logging_steps=1", "trainer.save_steps=4")
    whole = train(composed(*overrides, run="whole"))
    with pytest.raises(CrashedError):
        train(composed(*overrides, run="crashed"), progress=recorder(crash))
    run = Path(whole["run_dir"]).with_name("crashed")
    shutil.copytree(run / "checkpoints" / "checkpoint-4", run / "checkpoints" / "checkpoint-5")
    (run / "checkpoints" / "checkpoint-5" / "manifest.json").unlink()
    resumed = train(composed(*overrides, "resume=auto", run="crashed"))
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if line["event"] == "train"] == list(range(1, 9))
    assert [c.step for c in complete_checkpoints(run / "checkpoints")] == [4, 8]
    assert not (run / "checkpoints" / "checkpoint-5").exists()
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))


def test_best_adapter_survives_an_interruption(composed, recorder, adapter_bytes):
    overrides = (
        "evaluation.every_steps=1",
        "trainer.keep_best=true",
        "data.max_train_rows=3",
        "optimizer.learning_rate=0.1",
        "optimizer.schedule=constant",
        "trainer.max_grad_norm=0",
        "trainer.max_steps=3",
    )
    whole = train(composed(*overrides, run="whole"))
    with pytest.raises(Interrupted):
        train(composed(*overrides, run="halves"), progress=recorder(stop_at(whole["best_step"] + 1)))
    resumed = train(composed(*overrides, "resume=auto", run="halves"))
    assert resumed["best_step"] == whole["best_step"] < 3
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))


def test_resuming_a_finished_run_evaluates_and_writes_it_again(composed, adapter_bytes):
    summary = train(composed("trainer.max_steps=2"))
    before = adapter_bytes(Path(summary["adapter"]))
    shutil.rmtree(summary["adapter"])
    again = train(composed("trainer.max_steps=2", "resume=auto"))
    assert adapter_bytes(Path(again["adapter"])) == before
    assert again["eval"]["loss"] == summary["eval"]["loss"]
    assert again["train_loss"] == summary["train_loss"]


def test_a_stop_during_an_evaluation_saves_the_step(composed, recorder, adapter_bytes):
    overrides = ("evaluation.every_steps=2", "trainer.max_steps=4")
    whole = train(composed(*overrides, run="whole"))
    # The signal arrives between the end of step 2 and its evaluation.
    progress = recorder()
    progress.log = lambda metrics: os.kill(os.getpid(), signal.SIGTERM) if metrics["step"] == 2 else None
    with pytest.raises(Interrupted, match="step 2") as stopped:
        train(composed(*overrides, run="halves"), progress=progress)
    assert stopped.value.exit_code == 143
    assert progress.evaluations == []
    progress = recorder()
    resumed = train(composed(*overrides, "resume=auto", run="halves"), progress=progress)
    assert [e["step"] for e in progress.evaluations] == [2, 4]
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))


def test_a_stop_during_the_last_evaluation_can_be_made_up_for(composed, recorder, adapter_bytes):
    whole = train(composed("trainer.max_steps=2", run="whole"))
    progress = recorder()
    progress.log = lambda metrics: os.kill(os.getpid(), signal.SIGINT) if metrics["step"] == 2 else None
    with pytest.raises(Interrupted, match="step 2 of 2"):
        train(composed("trainer.max_steps=2", run="halves"), progress=progress)
    resumed = train(composed("trainer.max_steps=2", "resume=auto", run="halves"))
    assert resumed["eval"]["loss"] == whole["eval"]["loss"]
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))


def test_auto_without_a_checkpoint_starts_anew_and_says_so(composed, recorder):
    progress = recorder()
    assert train(composed("resume=auto", "trainer.max_steps=1"), progress=progress)["steps"] == 1
    assert any("starting at step 0" in message for message in progress.messages)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "totals.json"])
def test_a_damaged_checkpoint_is_refused(composed, lost):
    summary = train(composed("trainer.max_steps=1", "evaluation.at_end=false"))
    (Path(summary["run_dir"]) / "checkpoints" / "checkpoint-1" / lost).unlink()
    with pytest.raises(UserError, match=lost):
        train(composed("trainer.max_steps=2", "resume=auto"))


def test_a_checkpoint_that_does_not_fit_is_refused(composed):
    summary = train(composed("trainer.max_steps=1", "evaluation.at_end=false"))
    path = Path(summary["run_dir"]) / "checkpoints" / "checkpoint-1"
    with pytest.raises(UserError) as error:
        train(composed(f"resume={path}", "trainer.per_device_train_batch_size=2", "adapter.r=2"))
    text = str(error.value)
    assert "has 3 rows, one of this run 2" in text
    assert "r=4" in text
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        train(composed(f"resume={path}"))


def test_another_runs_folder_is_not_gone_on_into(composed, tmp_path):
    summary = train(composed("trainer.max_steps=1", "evaluation.at_end=false"))
    checkpoint = Path(summary["run_dir"]) / "checkpoints" / "checkpoint-1"
    fork = ("trainer.max_steps=2", f"resume={checkpoint}", "resume.allow_changes=true")
    forked = Path(train(composed(*fork, run="fork"))["run_dir"])
    kept = {file: file.read_bytes() for file in forked.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="run_dir holds a finished run"):
        train(composed(*fork, run="fork"))
    assert {file: file.read_bytes() for file in forked.rglob("*") if file.is_file()} == kept


@pytest.mark.parametrize("resume", [(), ("resume=auto",)])
def test_a_folder_that_no_run_has_made_keeps_what_it_holds(composed, tmp_path, resume):
    project = tmp_path / "project"
    project.mkdir()
    (project / "notes.txt").touch()
    (project / "config.yaml").write_text("mine: true\n")
    with pytest.raises(UserError, match=r"no run's folder, and holds config\.yaml"):
        train(composed(*resume, run="project"))
    assert (project / "config.yaml").read_text() == "mine: true\n"
    (project / "config.yaml").unlink()
    train(composed(*resume, "trainer.max_steps=1", run="project"))
    assert (project / "notes.txt").is_file()


def test_a_checkpoint_that_was_copied_alone_goes_on_in_its_folder(composed, tmp_path):
    summary = train(composed("trainer.max_steps=1", "evaluation.at_end=false"))
    copied = tmp_path / "copied"
    shutil.copytree(Path(summary["run_dir"]) / "checkpoints", copied / "checkpoints")
    checkpoint = copied / "checkpoints" / "checkpoint-1"
    again = train(composed("trainer.max_steps=2", f"resume={checkpoint}", "resume.allow_changes=true", run="copied"))
    assert again["final_step"] == 2


def test_a_run_of_the_first_format_is_no_stranger(composed, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("{}\n")
    assert open_run(composed("resume=auto").config).checkpoint is None


def test_checkpoints_are_rotated_and_whole(composed):
    summary = train(composed("trainer.save_steps=1", "trainer.save_total_limit=2", "evaluation.at_end=false"))
    root = Path(summary["run_dir"]) / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    listed = json.loads((root / "checkpoint-4" / "manifest.json").read_text())["files"]
    present = {str(p.relative_to(root / "checkpoint-4")) for p in (root / "checkpoint-4").rglob("*") if p.is_file()}
    assert present == {*listed, "manifest.json"}


def test_an_unfinished_run_is_not_overwritten(composed, recorder):
    with pytest.raises(Interrupted):
        train(composed(), progress=recorder(stop_at(1)))
    with pytest.raises(UserError, match="unfinished run"):
        train(composed())


def test_checkpoints_hold_the_update_of_the_head_alone(composed, adapter_bytes):
    head = ("adapter.target_modules=[q_proj,lm_head]", "trainer.save_steps=2")
    whole = RunDir(Path(train(composed(*head, run="whole"))["run_dir"]))
    for folder in (whole.adapter, whole.checkpoints / "checkpoint-2"):
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    train(composed(*head, run="cut"), until=2)
    again = RunDir(Path(train(composed(*head, "resume=auto", run="cut"))["run_dir"]))
    assert adapter_bytes(again.adapter) == adapter_bytes(whole.adapter)
