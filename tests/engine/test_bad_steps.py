"""Steps whose loss or gradient is no number are not applied, are counted, and end the run when there are too many."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qmemtune.engine.bad_steps import NEEDED, BadSteps, jumped
from qmemtune.engine.checkpoints import complete_checkpoints
from qmemtune.engine.language import LanguageTask
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.run import train
from qmemtune.engine.totals import RECENT, Totals
from qmemtune.errors import Diverged

STEADY = ("optimizer.schedule=constant_with_warmup", "optimizer.warmup_steps=0", "optimizer.weight_decay=0.1")


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of some batches, or only its gradient, no number; takes a function of the rows' origins."""

    def install(is_bad, *, loss: float | None = math.nan) -> None:
        healthy = LanguageTask.loss

        def poisoned(self, model, batch):
            total, auxiliary = healthy(self, model, batch)
            if is_bad(batch["origin"]):
                if loss is not None:
                    return total * loss, auxiliary
                total.register_hook(lambda gradient: gradient * math.nan)
            return total, auxiliary

        monkeypatch.setattr(LanguageTask, "loss", poisoned)

    return install


def nth(*bad: int):
    """Whether a call is one of those, counted from 1."""
    calls = iter(range(1, 1000))
    return lambda origins: next(calls) in bad


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"])
def test_a_bad_step_changes_neither_weights_nor_optimizer(composed, adapter_bytes, poison, name):
    poison(nth(3))
    summary = train(composed(f"optimizer.name={name}", *STEADY, "trainer.save_steps=1", "trainer.save_total_limit=9"))
    before, bad, after = (Path(summary["run_dir"]) / "checkpoints" / f"checkpoint-{step}" for step in (2, 3, 4))
    assert adapter_bytes(bad) == adapter_bytes(before)
    assert adapter_bytes(after) != adapter_bytes(bad)
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (before, bad)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "extra"),
    [
        (math.nan, ()),
        (math.inf, ("trainer.max_grad_norm=0",)),
        (None, ()),
        (None, ("trainer.max_grad_norm=0", "trainer.packing=true", "data.max_length=32")),
        (None, ("trainer.num_workers=2",)),
    ],
)
def test_one_bad_row_costs_its_steps_and_is_named(composed, poison, read_lines, rows_file, loss, extra):
    # A row that was found by its origin in one run is the only one to blame in the next.
    seen: set[str] = set()
    poison(lambda origins: bool(seen.update(origins)), loss=loss)
    train(composed("trainer.max_steps=2", *extra, run="look"))
    culprit = min(seen)
    assert culprit.startswith(str(rows_file))
    poison(lambda origins: culprit in origins, loss=loss)
    summary = train(composed("trainer.num_train_epochs=2", "~trainer.max_steps", "trainer.logging_steps=1", *extra))
    run = Path(summary["run_dir"])
    bad = read_lines(run / "bad_steps.jsonl")
    assert len(bad) == summary["skipped_steps"] == 2
    assert all(culprit in line["rows"] for line in bad)
    assert "nan" in (bad[0]["loss"], bad[0]["grad_norm"]) or "inf" in (bad[0]["loss"], bad[0]["grad_norm"])
    assert math.isfinite(summary["train_loss"])
    assert math.isfinite(summary["eval"]["loss"])
    lines = read_lines(run / "metrics.jsonl")
    none = [line["step"] for line in lines if line["event"] == "train" and line["loss"] is None]
    assert none == [line["step"] for line in bad]
    assert sum("is left out" in line.get("message", "") for line in lines) == 2


def test_one_bad_batch_spoils_its_accumulated_step(composed, adapter_bytes, poison):
    poison(nth(4), loss=None)
    summary = train(composed("trainer.gradient_accumulation_steps=2", *STEADY, "trainer.max_steps=2"))
    assert summary["skipped_steps"] == 1
    poison(nth())
    one = train(composed("trainer.gradient_accumulation_steps=2", *STEADY, "trainer.max_steps=1", run="one"))
    assert adapter_bytes(Path(summary["adapter"])) == adapter_bytes(Path(one["adapter"]))


def test_too_many_in_a_row_end_the_run_and_keep_the_state(composed, recorder, adapter_bytes, poison, read_lines):
    poison(nth(3, 5, 6, 7))
    overrides = (*STEADY, "trainer.max_steps=9", "trainer.max_bad_steps=3", "trainer.save_steps=1")
    progress = recorder()
    with pytest.raises(Diverged, match="the last 3 steps were left out") as stopped:
        train(composed(*overrides, "trainer.save_total_limit=1"), progress=progress)
    assert stopped.value.exit_code == 1
    finding = stopped.value.findings[0]
    assert progress.steps[-1] == 7
    assert progress.finished == 1
    bad = read_lines(Path(finding.where))
    assert [line["step"] for line in bad] == [3, 5, 6, 7]
    run = Path(finding.where).parent
    assert not (run / "summary.json").exists()
    # The last checkpoint before stays beside the one of the stop, and both hold the same weights.
    kept = complete_checkpoints(run / "checkpoints")
    assert [checkpoint.step for checkpoint in kept] == [6, 7]
    assert adapter_bytes(kept[0].path) == adapter_bytes(kept[1].path)
    poison(nth())
    summary = train(composed(*overrides, "resume=auto"))
    assert summary["steps"] == 9
    assert summary["skipped_steps"] == 4


def test_a_jump_of_the_loss_is_reported(tmp_path, recorder, read_lines):
    progress, totals = recorder(), Totals()
    log, metrics = JsonLines(tmp_path / "bad.jsonl"), JsonLines(tmp_path / "metrics.jsonl")
    watch = BadSteps(3, log=log, metrics=metrics, progress=progress, totals=totals)
    noise = torch.Generator().manual_seed(0)
    for step in range(1, 400):
        # A noisy loss that falls: nothing of it is a jump.
        watch.take(step, 3 / (1 + step / 100) + 0.2 * torch.randn((), generator=noise).item())
    assert (totals.loss_spikes, progress.messages) == (0, [])
    assert len(totals.recent_losses) == RECENT
    for step in range(400, 405):
        watch.take(step, 9.0)
        watch.take(step, 1.0)
    assert totals.loss_spikes == 5
    assert len(progress.messages) == 3
    assert len(read_lines(metrics.path)) == 5
    assert "jumped to 9" in progress.messages[0]
    assert jumped([1.0] * (NEEDED - 1), 100.0) is None
