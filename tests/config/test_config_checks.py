"""Combinations that cannot work are refused, those without effect warned about."""

from __future__ import annotations

import pytest

from qmemtune.config.compose import compose
from qmemtune.errors import UserError

BASE = ["model.path=a/b", "data.path=c/d"]
QUERYABLE = [*BASE, "adapter=queryable"]
SOURCES = ["~data.path", "data.sources.a.path=e/f"]
REGRESSION = ["model.path=generated:mlp", "data.path=generated:noisy_regression"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([*QUERYABLE, "adapter.top_k=17"], "top_k = 17 is more than num_atoms = 16"),
        ([*QUERYABLE, "adapter.top_k=0"], "at least 1"),
        ([*QUERYABLE, "adapter.num_atoms=0"], "at least 1"),
        ([*QUERYABLE, "adapter.core_weight_decay=-1"], "must not be negative"),
        ([*QUERYABLE, "adapter.prior_temperature=0"], "must be above 0"),
        ([*QUERYABLE, "trainer.gradient_checkpointing_use_reentrant=true"], "reentrant"),
        ([*QUERYABLE, "adapter.granularity=row", "evaluation.exact_match.enabled=true"], "for losses only"),
        ([*QUERYABLE, "adapter.granularity=row", "evaluation.samples.every_steps=5"], "for losses only"),
        ([*QUERYABLE, "adapter.granularity=row", "evaluation.tasks=[gsm8k]"], "for losses only"),
        ([*BASE, "adapter.r=0"], "at least 1"),
        ([*BASE, "adapter.dropout=1"], "must be in [0, 1)"),
        ([*BASE, "adapter.target_modules=[]"], "names no layer"),
        ([*BASE, "adapter.target_modules=[all-linear,q_proj]"], "beside other names"),
        ([*BASE, "adapter.layers_to_transform=[-1]"], "indices from 0"),
        ([*BASE, "adapter.init=pissa", "quantization=nf4"], "full-precision"),
        ([*BASE, "adapter.init=orthogonal", "adapter.r=5"], "even rank"),
        ([*BASE, "data.max_length=0"], "at least 1"),
        ([*BASE, "data.eval_fraction=1.5"], "must be in [0, 1)"),
        ([*BASE, "data.remove_pattern=("], "not a regular expression"),
        ([*BASE, "trainer.per_device_train_batch_size=-1"], "at least 1"),
        ([*BASE, "trainer.max_steps=10", "optimizer.warmup_steps=10"], "does not end within the run's 10"),
        ([*BASE, "optimizer.warmup_steps=1.5"], "must be whole"),
        ([*BASE, "optimizer.learning_rate=0"], "above 0"),
        ([*BASE, "optimizer.betas=[0.9]"], "two numbers"),
        ([*BASE, "trainer.early_stopping_patience=2"], "needs evaluations during training"),
        ([*BASE, "trainer.keep_best=true", "evaluation.every_steps=5", "data.eval_fraction=0"], "none are held out"),
        ([*BASE, "evaluation.samples.every_steps=5", "data.eval_fraction=0"], "none are held out"),
        ([*BASE, "trainer.keep_best=true", "evaluation.every_steps=5", "trainer.save_steps=7"], "multiple of 5"),
        ([*BASE, "data.path=/nowhere/rows.jsonl"], "does not exist"),
        ([*BASE, "model.path=./nowhere"], "does not exist"),
        ([*BASE, "model.chat_template=nowhere.jinja"], "does not exist"),
        ([*BASE, "resume=runs/x/checkpoint-5"], "does not exist"),
        ([*BASE, "resume=auto"], "needs to know the run folder"),
        ([*BASE, "data.path="], "is empty"),
        ([*BASE, "seed=-1"], "must not be negative"),
        ([*BASE, "seed=4294967296"], "below 2**32"),
        ([*BASE, "+recipe_name=x"], "unknown key"),
    ],
)
def test_what_cannot_work_is_refused(overrides, problem):
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert any(problem in str(finding) for finding in caught.value.findings), caught.value
    # The last override is the one at fault, and is named.
    assert any(finding.where in overrides or "(default)" in finding.where for finding in caught.value.findings)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_way_out_of_an_initialisation_leads_out(init):
    with pytest.raises(UserError) as caught:
        compose([*BASE, "quantization=nf4", f"adapter.init={init}"])
    assert caught.value.findings[0].fix == "set quantization=none, or adapter.init=default"
    compose([*BASE, "quantization=nf4", "adapter.init=default"])


def test_checks_report_together():
    with pytest.raises(UserError) as caught:
        compose([*QUERYABLE, "adapter.top_k=99", "adapter.r=0", "trainer.keep_best=true"])
    assert len(caught.value.findings) == 3


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.path=generated:word_lists", "data.split=test"], "data.split"),
        (["data.eval_path=e/f", "data.eval_fraction=0.1"], "data.eval_fraction"),
        (["data.eval_path=e/f", "data.split_seed=1"], "data.split_seed"),
        ([*SOURCES, "data.sources.a.weight=2", "data.eval_path=e/f", "data.split_seed=1"], "data.split_seed"),
        (["evaluation.exact_match.max_rows=5"], "evaluation.exact_match.max_rows"),
        (["evaluation.samples.count=5"], "evaluation.samples.count"),
        (["evaluation.tasks_limit=5"], "evaluation.tasks_limit"),
        (["quantization.double_quant=false"], "quantization.double_quant"),
        (["quantization.dequantized_copies=never"], "quantization.dequantized_copies"),
        (["trainer.gradient_checkpointing_use_reentrant=true"], "trainer.gradient_checkpointing_use_reentrant"),
        (["model.path=package:a/b.gguf", "model.revision=main"], "model.revision"),
        (["adapter=queryable", "adapter.prior_kl=0.1"], "adapter.prior_kl"),
        (["adapter=queryable", "adapter.instruction_prior=1", "data.instruction=none"], "adapter.instruction_prior"),
        (["trainer.max_steps=5", "trainer.num_train_epochs=2"], "trainer.num_train_epochs"),
        (["optimizer=sgd", "optimizer.eps=1e-6"], "optimizer.eps"),
        (["optimizer.schedule=constant", "optimizer.warmup_steps=5"], "optimizer.warmup_steps"),
        (["tracking.project=x"], "tracking.project"),
        (["export.format=lora", "export.dtype=float32"], "export.dtype"),
        (["export.calibration_rows=5"], "export.calibration_rows"),
        (["export.fidelity=false", "export.max_kl=0.1"], "export.max_kl"),
        (["data.format=messages", "data.prompt_template={x}"], "data.prompt_template"),
        (["model.mlp.width=5"], "model.mlp.width"),
        (["data.regression.noise_std=0.1"], "data.regression.noise_std"),
        ([*REGRESSION, "data.max_length=5"], "data.max_length"),
        ([*REGRESSION, "model.tokenizer=x/y"], "model.tokenizer"),
        ([*REGRESSION, "trainer.packing=true"], "trainer.packing"),
    ],
)
def test_what_does_nothing_is_warned_about(overrides, key):
    composed = compose([*BASE, *overrides])
    assert [line for line in composed.warnings if f"{key} has no effect" in line], composed.warnings
    assert len(composed.warnings) == 1


@pytest.mark.parametrize(
    ("overrides", "unused"),
    [
        (["data.path=./folder", "data.split=dev", "data.eval_split=test"], []),
        (["data.split=dev", "data.eval_split=test", "data.name=main"], []),
        (["data.path=rows.jsonl", "data.eval_split=test"], ["data.eval_split"]),
        (["data.path=*.jsonl", "data.split=dev", "data.eval_split=test"], ["data.split", "data.eval_split"]),
        (["data.path=rows.jsonl", "data.eval_path=./folder", "data.eval_split=test"], []),
        (["data.path=rows.jsonl", "data.eval_path=e/f", "data.split=dev", "data.name=main"], []),
        (["data.eval_path=rows.jsonl", "data.eval_split=test"], ["data.eval_split"]),
        (
            ["~data.path", "data.sources.a.path=./folder", "data.sources.a.split=dev", "data.eval_split=test"],
            ["data.eval_split"],
        ),
        (["~data.path", "data.sources.a.path=rows.jsonl", "data.sources.a.split=dev"], ["data.sources.a.split"]),
    ],
)
def test_folders_and_hub_data_sets_have_splits_and_files_have_none(tmp_path, monkeypatch, overrides, unused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    warnings = compose([*BASE, *overrides]).warnings
    assert [line.split(": ")[1].removesuffix(" has no effect") for line in warnings] == unused


@pytest.mark.parametrize(
    "overrides",
    [
        [*SOURCES, "data.sources.a.weight=0.5", "data.eval_path=e/f", "data.split_seed=1"],
        [*SOURCES, "data.sources.a.weight=2.5", "data.eval_path=e/f", "data.split_seed=1"],
        [*SOURCES, "data.sources.a.weight=2", "data.max_train_rows=9", "data.eval_path=e/f", "data.split_seed=1"],
        [*QUERYABLE, "export.fidelity=false", "export.max_kl=0.1"],
    ],
    ids=["half of a set", "two and a half", "part of a set", "whether to distil"],
)
def test_what_has_another_effect_yet_is_not_warned_about(overrides):
    assert compose([*BASE, *overrides]).warnings == []


def test_a_system_prompt_has_its_effect_without_a_chat_template():
    assert compose([*BASE, "data.chat=never", "data.system=Be brief."]).warnings == []


def test_literal_backslash_n_in_a_template_is_warned_about():
    (line,) = compose([*BASE, "data.prompt_template=Q: {q}\\nA: "]).warnings
    assert "not a line break" in line
