"""A dry run counts what the run then does, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmemtune.engine.plan import plan
from qmemtune.engine.run import train
from qmemtune.errors import UserError


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_the_plan_is_what_happens(composed, recorder, tmp_path, adapter):
    overrides = ("trainer.max_steps=null", "trainer.num_train_epochs=2", "trainer.gradient_accumulation_steps=3")
    made = composed(*overrides, adapter=adapter)
    planned = plan(made)
    assert list(tmp_path.iterdir()) == []
    progress = recorder()
    summary = train(made, progress=progress)
    facts = progress.started[0][1]
    assert planned["steps"] == summary["steps"] == progress.started[0][0]
    assert planned["tokens"] == summary["tokens"]
    assert planned["trainable_parameters"] == summary["trainable_parameters"]
    assert planned["total_parameters"] == facts["total_parameters"] - summary["trainable_parameters"]
    assert planned["rows"] == facts["rows"]
    size = (Path(summary["adapter"]) / "adapter_model.safetensors").stat().st_size
    assert planned["adapter_mb"] * 1e6 == pytest.approx(size, rel=0.3)


def test_initialisations_that_need_weights_are_counted_too(composed):
    plain = plan(composed())
    assert plan(composed("adapter.init=olora"))["trainable_parameters"] == plain["trainable_parameters"]


def test_an_occupied_folder_is_found_out(composed):
    train(composed("trainer.max_steps=1", "evaluation.at_end=false"))
    with pytest.raises(UserError, match="finished run"):
        plan(composed())


def test_targets_that_match_nothing_are_found_out(composed):
    with pytest.raises(UserError, match="matches no linear layer"):
        plan(composed("adapter.target_modules=[q_prj]"))
