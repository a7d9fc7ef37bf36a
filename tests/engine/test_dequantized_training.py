"""Training on dequantised copies of 4-bit weights gives the bits of training without them, and leaves no copies."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from qmemtune.engine import run
from qmemtune.engine.run import train
from qmemtune.engine.trainer import RunTrainer

COPIES = "dequantised copies"


def quantised_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.fixture
def trained(monkeypatch) -> list[RunTrainer]:
    """The trainers that were made."""
    made: list[RunTrainer] = []
    make = run.make_trainer
    monkeypatch.setattr(run, "make_trainer", lambda *args: made.append(make(*args)) or made[-1])
    return made


@pytest.fixture
def replaced(monkeypatch) -> list[int]:
    """How many 4-bit layers had another forward at each loss computed."""
    counts: list[int] = []
    compute_loss = RunTrainer.compute_loss

    def counting(self: RunTrainer, model: torch.nn.Module, *args, **kwargs):
        counts.append(sum("forward" in layer.__dict__ for layer in quantised_layers(model)))
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "compute_loss", counting)
    return counts


@pytest.mark.parametrize(
    ("adapter", "dtype", "checkpointing"),
    [("lora", "float32", False), ("lora", "bfloat16", True), ("queryable", "float32", True)],
)
def test_copies_change_no_bit(composed, recorder, adapter_bytes, trained, replaced, adapter, dtype, checkpointing):
    results, counts, messages = [], [], []
    for copies in ("auto", "never"):
        replaced.clear()
        progress = recorder()
        made = composed(
            "quantization=nf4",
            f"quantization.dequantized_copies={copies}",
            f"model.compute_dtype={dtype}",
            f"trainer.gradient_checkpointing={str(checkpointing).lower()}",
            "trainer.max_steps=3",
            "evaluation.every_steps=1",
            "evaluation.exact_match.enabled=true",
            "evaluation.exact_match.every_steps=2",
            "evaluation.exact_match.max_new_tokens=3",
            adapter=adapter,
            run=copies,
        )
        summary = train(made, progress=progress)
        results.append((adapter_bytes(Path(summary["adapter"])), summary["eval"]["loss"], summary["train_loss"]))
        counts.append(list(replaced))
        messages.append([text for text in progress.messages if COPIES in text])
    assert results[0] == results[1]
    layers = len(quantised_layers(trained[0].model))
    assert counts == [[layers] * 3, [0] * 3]
    assert [len(found) for found in messages] == [1, 0]
    for trainer in trained:
        assert not any("forward" in layer.__dict__ for layer in quantised_layers(trainer.model))


def test_forwards_return_after_an_error(composed, recorder, trained, replaced):
    def fail(step: int) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        train(composed("quantization=nf4"), progress=recorder(fail))
    layers = quantised_layers(trained[0].model)
    assert replaced == [len(layers)]
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_an_unquantised_run_says_nothing_of_copies(composed, recorder):
    progress = recorder()
    train(composed("trainer.max_steps=1", "evaluation.at_end=false"), progress=progress)
    assert not any(COPIES in text for text in progress.messages)
