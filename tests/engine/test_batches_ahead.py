"""Batches that are read while a GPU computes: the same run, and an error in its own step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qmemtune.data.collate import Collator
from qmemtune.engine import trainer
from qmemtune.engine.run import train
from qmemtune.engine.trainer import RunTrainer

EPOCHS = (
    "trainer.max_steps=null",
    "trainer.num_train_epochs=2",
    "trainer.gradient_accumulation_steps=3",
    "trainer.padding_free=false",
    "trainer.save_steps=3",
    "evaluation.every_steps=2",
)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunTrainer, "_waits_for_a_device", lambda self: True)


def test_the_same_run(
    composed: Callable, adapter_bytes: Callable, tmp_path, monkeypatch: pytest.MonkeyPatch, request
) -> None:
    train(composed(*EPOCHS, run="plain"))
    request.getfixturevalue("ahead")
    train(composed(*EPOCHS, run="ahead"))
    train(composed(*EPOCHS, run="halved"), until=3)
    train(composed(*EPOCHS, "resume=auto", run="halved"))
    plain, read_ahead, halved = (adapter_bytes(tmp_path / run / "adapter") for run in ("plain", "ahead", "halved"))
    assert plain == read_ahead == halved


def test_a_row_that_cannot_be_read_costs_no_step_before_it(
    composed: Callable, recorder: Callable, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    real, calls = Collator.__call__, []

    def third_fails(self: Collator, rows: list) -> dict:
        calls.append(len(rows))
        if len(calls) == 3:
            raise RuntimeError("a row that cannot be read")
        return real(self, rows)

    monkeypatch.setattr(Collator, "__call__", third_fails)
    steps = []
    for run in ("plain", "ahead"):
        if run == "ahead":
            request.getfixturevalue("ahead")
        calls.clear()
        progress = recorder()
        with pytest.raises(RuntimeError, match="a row that cannot be read"):
            train(composed("trainer.padding_free=false", "evaluation.at_end=false", run=run), progress=progress)
        steps.append(progress.steps)
    assert steps[0]
    assert steps[1] == steps[0]


def test_layers_of_a_sharded_model_are_not_fused(composed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = trainer.fused_layers
    monkeypatch.setattr(trainer, "fused_layers", lambda model: (opened.append(1), real(model))[1])
    train(composed("trainer.max_steps=1", "evaluation.at_end=false", run="whole"))
    assert opened
    opened.clear()
    monkeypatch.setattr(trainer, "is_sharded", lambda args: True)
    train(composed("trainer.max_steps=1", "evaluation.at_end=false", run="sharded"))
    assert not opened
