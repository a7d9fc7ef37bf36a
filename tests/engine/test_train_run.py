"""A run from start to end: what it writes, returns and tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmemtune.cli.app import main
from qmemtune.engine.restore import load_run
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.rundir import RunDir


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_a_run_writes_its_folder(composed, recorder, read_lines, adapter):
    made = composed("evaluation.every_steps=2", "evaluation.samples.every_steps=2", adapter=adapter)
    progress = recorder()
    summary = train(made, progress=progress)
    run = RunDir(Path(summary["run_dir"]))
    assert json.loads(run.summary.read_text()) == summary
    assert summary["steps"] == 4
    assert summary["train_loss"] > 0
    assert summary["eval"]["loss"] > 0
    assert summary["eval"]["perplexity"] > 1
    assert summary["trainable_parameters"] > 0
    assert summary["tokens_per_s"] > 0
    assert summary["step_s_median"] > 0
    assert summary["first_step_done_s"] > 0
    assert summary["peak_rss_mib"] > 0
    assert (run.adapter / "adapter_config.json").is_file()
    assert (run.adapter / "tokenizer.json").is_file()
    assert not list(run.path.rglob("*.bin"))
    assert json.loads(run.environment.read_text())["versions"]["torch"]
    lines = read_lines(run.metrics)
    logged = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in logged] == [2, 4]
    assert all({"loss", "learning_rate", "grad_norm", "tokens_per_s", "epoch"} <= set(line) for line in logged)
    assert [line["step"] for line in lines if line["event"] == "evaluation"] == [2, 4]
    samples = read_lines(run.samples)
    assert {sample["step"] for sample in samples} == {2, 4}
    assert progress.steps == [1, 2, 3, 4]
    assert progress.finished == 1
    assert progress.started[0][0] == 4
    assert [e["step"] for e in progress.evaluations] == [2, 4]


@pytest.mark.parametrize(
    "option", ["adapter.granularity=row", "adapter.shared_atoms=false", "adapter.generated_core=true"]
)
def test_variants_for_studies_train_from_their_preflight_to_their_last_evaluation(composed, option):
    summary = train(composed(option, "evaluation.at_start=true", "evaluation.every_steps=2", adapter="queryable"))
    assert summary["steps"] == 4
    assert 0 < summary["eval"]["loss"] < 10


@pytest.mark.parametrize("verb", ["eval", "generate", "inspect", "merge-export"])
def test_what_routes_of_whole_rows_cannot_do_is_said(composed, capsys, tmp_path, verb):
    train(composed("adapter.granularity=row", adapter="queryable"))
    more = ["--prompt", "Name", "--max-new-tokens", "2"] if verb == "generate" else []
    code = main([verb, f"run_dir={tmp_path / 'run'}", *more, "--quiet"])
    said = capsys.readouterr().err
    assert code == (0 if verb == "eval" else 2), said
    assert verb == "eval" or "one route a row" in said


def test_the_loss_falls(composed):
    summary = train(composed("trainer.max_steps=30", "optimizer.learning_rate=0.02", "evaluation.every_steps=30"))
    start = train(composed("trainer.max_steps=1", "optimizer.learning_rate=1e-9", run="start"))
    assert summary["eval"]["loss"] < start["eval"]["loss"] - 0.2


def test_a_loaded_run_has_the_trained_model(composed):
    made = composed(adapter="queryable")
    summary = train(made)
    loaded = load_run(RunDir(Path(summary["run_dir"])), made.config)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    from qmemtune.data.prepare import prepare_heldout
    from qmemtune.evaluation.evaluate import evaluate

    rows = prepare_heldout(made.config.data, loaded.tokenizer).heldout
    result = evaluate(
        loaded.model,
        loaded.tokenizer,
        rows,
        made.config.evaluation,
        source=loaded.source,
        device=loaded.device,
        dtype=loaded.dtype,
        exact_match=False,
    )
    assert result.as_dict()["loss"] == pytest.approx(summary["eval"]["loss"], abs=1e-6)


def test_a_finished_run_is_not_overwritten(composed):
    made = composed("trainer.max_steps=1")
    train(made)
    with pytest.raises(UserError, match="finished run"):
        train(made)


def test_a_run_without_an_adapter_is_refused(composed, tmp_path):
    with pytest.raises(UserError, match="no final adapter"):
        load_run(RunDir(tmp_path), composed().config)


def test_keep_best_ends_with_the_best_adapter(composed):
    # Three rows and a high learning rate: held-out rows are answered best after the first step.
    made = composed(
        "evaluation.every_steps=1",
        "trainer.keep_best=true",
        "data.max_train_rows=3",
        "optimizer.learning_rate=0.1",
        "optimizer.schedule=constant",
        "trainer.max_grad_norm=0",
        "trainer.max_steps=3",
    )
    summary = train(made)
    lines = [json.loads(line) for line in (Path(summary["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "evaluation"}
    best = min(losses, key=losses.__getitem__)
    assert best < 3
    assert summary["best_step"] == summary["final_step"] == best
    assert summary["eval"]["loss"] == pytest.approx(losses[best])
    again = load_run(RunDir(Path(summary["run_dir"])), made.config)
    assert sum(p.abs().sum() for n, p in again.model.named_parameters() if "lora_" in n) > 0


def test_early_stopping(composed):
    made = composed(
        "evaluation.every_steps=1",
        "trainer.early_stopping_patience=2",
        "optimizer.learning_rate=0.5",
        "optimizer.schedule=constant",
        "trainer.max_steps=40",
    )
    summary = train(made)
    assert summary["stopped_early"]
    assert summary["steps"] < 40


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_steps(composed, name):
    summary = train(composed(f"optimizer.name={name}", "trainer.max_steps=2", "evaluation.at_end=false"))
    assert summary["steps"] == 2
    assert summary["eval"] == {}


@pytest.mark.parametrize("schedule", ["linear", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_every_schedule_steps(composed, schedule):
    overrides = [f"optimizer.schedule={schedule}", "optimizer.warmup_steps=1", "trainer.max_steps=2"]
    assert train(composed(*overrides, "evaluation.at_end=false"))["steps"] == 2


def test_bfloat16_keeps_adapter_weights_in_float32(composed):
    from safetensors.torch import load_file

    made = composed("model.compute_dtype=bfloat16", "trainer.max_steps=2", adapter="queryable")
    summary = train(made)
    weights = load_file(Path(summary["adapter"]) / "adapter_model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.float32"}
    assert summary["eval"]["loss"] > 0


def test_a_loss_that_is_not_a_number_stops_the_run(composed):
    broken = ("optimizer.learning_rate=1e30", "trainer.max_grad_norm=0", "optimizer.schedule=constant")
    with pytest.raises(UserError, match="the last 3 steps were left out") as error:
        train(composed(*broken, "trainer.max_bad_steps=3"))
    assert error.value.exit_code == 1


def test_tensorboard_writes_into_the_run_folder(composed):
    pytest.importorskip("tensorboard")
    summary = train(composed("tracking.backends=[tensorboard]", "trainer.max_steps=2"))
    assert list((Path(summary["run_dir"]) / "tracking").glob("events*"))
