"""What is left of a queryable memory when it is made static: one run, every way.

Takes a finished run with a memory, and measures on all its held-out rows: the base, the live model, static stand-ins
(mean, least squares, distilled at the run's rank and at twice that), and a LoRA trained from scratch at the same rank
on the same rows. Printed are held-out loss, the share of the live model's gain over the base that is kept (with a 95 %
bootstrap interval over rows), exact match where the run has one, mean KL to the live model, and the time to export.

    python benchmarks/export.py --run runs/quickstart/20260101-000000
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from report import bootstrap_share, write_section

from qmemtune.config.adapters import LoraConfig
from qmemtune.config.compose import Composed
from qmemtune.config.of_run import load_resolved
from qmemtune.config.schema import Config, ResumeConfig
from qmemtune.data.prepare import prepare_heldout
from qmemtune.engine.restore import LoadedRun, load_run
from qmemtune.engine.run import train
from qmemtune.evaluation.exact_match import row_matches
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import RowLoss, row_losses
from qmemtune.export import export_run
from qmemtune.export.fidelity import fidelity
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast
from qmemtune.models.loading import load_base
from qmemtune.rundir import RunDir, find_run
from qmemtune.study.tables import table


@dataclass
class Measured:
    """One model on the held-out rows."""

    losses: list[RowLoss]
    exact_match: float | None
    kl: float
    seconds: float = 0.0
    """To make it."""

    @property
    def loss(self) -> float:
        return mean_loss(self.losses, range(len(self.losses)))


def mean_loss(losses: list[RowLoss], rows: Sequence[int]) -> float:
    """Nats a token over some rows."""
    return sum(losses[i].loss_sum for i in rows) / max(1, sum(losses[i].tokens for i in rows))


def measure(live: LoadedRun, model: Any, rows: list[Any], source: Any = None) -> Measured:
    """Loss, exact match and KL of a model on all rows."""
    config, cast = live.config.evaluation, partial(autocast, live.device, live.dtype)
    batch = {"batch_size": config.per_device_eval_batch_size, "source": source, "autocast": cast}
    with undisturbed(model), dequantized_on_cpu(model):
        losses = row_losses(model, rows, pad_token_id=live.tokenizer.pad_token_id, **batch)
        matches = None
        if config.exact_match.enabled:
            matches = row_matches(model, live.tokenizer, rows, config.exact_match, **batch)
    share = None if matches is None else sum(match.correct for match in matches) / len(matches)
    return Measured(losses, share, fidelity(live, model, rows, source=source)["kl_mean"])


def static(live: LoadedRun, run: RunDir, config: Config, rows: list[Any], **options: Any) -> Measured:
    """An export as a LoRA, loaded back."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "out")
        export = replace(config.export, format="lora", path=path, fidelity=False, **options)
        start = time.perf_counter()
        export_run(run, replace(config, export=export))
        seconds = time.perf_counter() - start
        found = measure(live, with_lora(live, path), rows)
    found.seconds = seconds
    return found


def with_lora(live: LoadedRun, folder: str) -> PeftModel:
    """The run's base with a LoRA."""
    gc.collect()
    base = load_base(live.config.model, live.config.quantization, device=live.device)
    return PeftModel.from_pretrained(base, folder)


def from_scratch(live: LoadedRun, config: Config, rows: list[Any]) -> Measured:
    """A LoRA of the run's rank, trained as the run was."""
    adapter = config.adapter
    lora = LoraConfig(r=adapter.r, alpha=adapter.alpha, target_modules=list(adapter.target_modules))
    with tempfile.TemporaryDirectory() as folder:
        alone = replace(config, adapter=lora, run_dir=str(Path(folder) / "run"), resume=ResumeConfig())
        start = time.perf_counter()
        train(Composed(alone, {}, alone.recipe))
        seconds = time.perf_counter() - start
        found = measure(live, with_lora(live, str(Path(folder) / "run" / "adapter")), rows)
    found.seconds = seconds
    return found


def kept(base: Measured, live: Measured, found: Measured) -> str:
    """Share of the live model's gain over the base, with its interval."""

    def share(chosen: Sequence[int]) -> float:
        before, gain = mean_loss(base.losses, chosen), mean_loss(live.losses, chosen)
        return (before - mean_loss(found.losses, chosen)) / (before - gain)

    return bootstrap_share(share, len(base.losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run folder; the newest run if not given")
    parser.add_argument("--rows", type=int, help="use at most so many held-out rows")
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/README.md")
    parser.add_argument("overrides", nargs="*", help="key=value, such as export.distill_steps=200")
    args = parser.parse_args()
    run = find_run(args.run)
    config = load_resolved(run.config, args.overrides).config
    live = load_run(run, config)
    rows = list(prepare_heldout(config.data, live.tokenizer).heldout)[: args.rows]
    # Loaded beside the live model: its divergence from the live one needs both at once.
    base = measure(live, load_base(config.model, config.quantization, device=live.device), rows)
    rank = config.adapter.r
    found = {
        "base": base,
        "live": measure(live, live.model, rows, live.source),
        "mean": static(live, run, config, rows, fold="mean"),
        "least squares": static(live, run, config, rows, fold="least_squares"),
        f"distilled, r={rank}": static(live, run, config, rows, fold="distill", rank=rank),
        f"distilled, r={2 * rank}": static(live, run, config, rows, fold="distill", rank=2 * rank),
        f"LoRA from scratch, r={rank}": from_scratch(live, config, rows),
    }
    lines = []
    for name, value in found.items():
        share = "" if name == "base" else kept(base, found["live"], value)
        match = "" if value.exact_match is None else f"{value.exact_match:.1%}"
        seconds = f"{value.seconds:.0f}" if value.seconds else ""
        lines.append([name, f"{value.loss:.4f}", share, match, f"{value.kl:.2e}", seconds])
    heads = ["model", "held-out loss", "gain kept (95 %)", "exact match", "mean KL to live", "seconds"]
    text = f"{config.recipe}, {len(rows)} held-out rows.\n\n{table(heads, lines)}"
    print(text)
    if args.write:
        write_section(f"Making a memory static: {config.recipe}", text)


if __name__ == "__main__":
    main()
