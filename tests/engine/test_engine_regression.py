"""A regression is a run like any other: summary, metrics, checkpoints, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from qmemtune.cli.app import main
from qmemtune.config.compose import compose
from qmemtune.config.data import RegressionDataConfig
from qmemtune.config.model import MlpConfig
from qmemtune.data.regression import Functions
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.models.gguf import models_root
from qmemtune.models.mlp import trained_mlp
from qmemtune.rundir import RunDir, cache_root, read_json

SMALL = [
    "recipe=regression_noisy", "data.regression.rows=256", "data.regression.heldout_rows=128", "model.mlp.width=16",
    "model.mlp.depth=2", "model.mlp.pretrain_steps=200", "trainer.max_steps=60", "trainer.logging_steps=20",
    "trainer.per_device_train_batch_size=32", "evaluation.at_start=true",
]  # fmt: skip


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_a_regression_is_trained_and_measured(tmp_path, adapter):
    summary = train(compose([*SMALL, f"adapter={adapter}", f"run_dir={tmp_path / 'run'}"]))
    run = RunDir(tmp_path / "run")
    events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    before = next(event["loss"] for event in events if event["event"] == "evaluation" and event["step"] == 0)
    assert summary["eval"]["loss"] < before
    assert summary["eval"]["rows"] == 128
    assert read_json(run.summary)["adapter_kind"] == adapter
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-60"]


def test_a_resumed_regression_ends_like_a_whole_one(tmp_path):
    whole = train(compose([*SMALL, f"run_dir={tmp_path / 'whole'}"]))
    train(compose([*SMALL, "trainer.save_steps=30", f"run_dir={tmp_path / 'other'}"]))
    checkpoint = tmp_path / "other" / "checkpoints" / "checkpoint-30"
    again = train(compose([*SMALL, f"resume={checkpoint}", f"run_dir={tmp_path / 'again'}"]))
    assert again["eval"]["loss"] == whole["eval"]["loss"]


def test_the_base_has_learned_the_first_function_and_is_kept(session_cache):
    functions = Functions(RegressionDataConfig(inputs=4), seed=5)
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))

    def base():
        shape = {"inputs": 4, "outputs": 1, "seed": 5, "problem": functions.described}
        return trained_mlp(MlpConfig(width=32, depth=2, pretrain_steps=300), functions.first, **shape)

    first = base()
    assert (first(x) - functions.first(x)).square().mean() < 0.3 * functions.first(x).var()
    torch.testing.assert_close(base()(x), first(x), rtol=0, atol=0)
    assert list(models_root().glob("mlp-*.safetensors")), "it belongs beside the other models in the cache"
    assert not list(cache_root().glob("mlp-*"))


def test_the_second_function_differs_by_the_given_spread():
    x = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    functions = Functions(RegressionDataConfig(correction_std=0.5), seed=3)
    assert (functions.second(x) - functions.first(x)).std().item() == pytest.approx(0.5, rel=0.05)
    again = Functions(RegressionDataConfig(correction_std=0.5), seed=3)
    torch.testing.assert_close(again.second(x), functions.second(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantization=nf4", "no quantised form"),
        ("data=gsm8k", "recipe=regression_noisy"),
        ("evaluation.exact_match.enabled=true", "generates no answers"),
        ("trainer.gradient_checkpointing=true", "no such mode"),
    ],
)
def test_what_a_regression_cannot_have_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        compose(["recipe=regression_noisy", override])


def test_dry_run_counts_a_regression(capsys):
    assert main(["train", *SMALL, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["rows"], planned["heldout_rows"], planned["steps"]) == (256, 128, 60)


def test_verbs_for_language_models_say_what_it_is(tmp_path, capsys):
    train(compose([*SMALL, "trainer.max_steps=1", "evaluation.at_end=false", f"run_dir={tmp_path / 'run'}"]))
    for verb in ("eval", "merge-export", "inspect"):
        assert main([verb, f"run_dir={tmp_path / 'run'}"]) == 2, verb
        assert "regression" in capsys.readouterr().err
