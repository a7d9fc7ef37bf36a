"""What is left of a queryable memory when it is made static, on the regression study, where routing matters most.

For each seed (a problem of its own) a memory is trained as in `qmemtune study regression`; measured on held-out rows
are the base, the live model, its folds (mean route, least squares), LoRAs distilled from it on its outputs over the
training inputs alone, and a LoRA of the same rank trained from scratch. Printed are mean squared errors, the share of
the live model's gain that is kept (95 % bootstrap interval over seeds), and the mean squared distance to live outputs.

    python benchmarks/export_regression.py --seeds 10 --write
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from report import bootstrap_share, write_section
from torch import Tensor, nn

from qmemtune.adapters import apply_adapter
from qmemtune.adapters.queryable.fold import FoldedLayer, least_squares_fold, mean_fold, resized
from qmemtune.config.adapters import LoraConfig
from qmemtune.config.compose import Composed, compose
from qmemtune.config.schema import Config
from qmemtune.data.regression import RegressionData, TensorRows, prepare_regression
from qmemtune.engine.regression import RegressionTask, regression_base
from qmemtune.engine.run import train
from qmemtune.evaluation.guard import undisturbed
from qmemtune.study.studies.regression import QUERYABLE, STUDY
from qmemtune.study.tables import table

CPU = torch.device("cpu")


def trained(config: Config, data: RegressionData, start: Mapping[str, FoldedLayer] | None = None) -> nn.Module:
    """An adapted base after the run of ``config`` on the rows of ``data``, begun with given factors."""
    base = copy.deepcopy(regression_base(config.model.mlp, data))
    model = apply_adapter(base, config.adapter, seed=config.seed)
    if start is not None:
        begin_with(model, start, config)
    with tempfile.TemporaryDirectory() as folder:
        alone = replace(config, run_dir=str(Path(folder) / "run"))
        train(
            Composed(alone, {}, alone.recipe),
            make_task=lambda args, dtype: RegressionTask(model, data, alone, device=CPU, dtype=dtype),
        )
    return model


def begin_with(model: nn.Module, start: Mapping[str, FoldedLayer], config: Config) -> None:
    """Set the factors of a LoRA."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for path, layer in start.items():
            fitted, target = resized(layer, config.adapter.r, generator=generator), model.base_model.model
            module = target.get_submodule(path)
            module.lora_A["default"].weight.copy_(fitted.lora_A)
            module.lora_B["default"].weight.copy_(fitted.lora_B)


def lora_of(config: Config, rank: int) -> Config:
    """The run with a LoRA of some rank, whose scaling is the memory's."""
    adapter = config.adapter
    lora = LoraConfig(r=rank, alpha=2.0 * rank, target_modules=list(adapter.target_modules))
    return replace(config, adapter=lora)


def one_seed(seed: int) -> dict[str, tuple[float, float, float]]:
    """Name of a model -> held-out error, squared distance to live, seconds."""
    ample = STUDY.settings[0].overrides
    overrides = [f"recipe={STUDY.recipe}", *STUDY.overrides, *ample, *QUERYABLE, f"seed={seed}"]
    config = compose(overrides).config
    data = prepare_regression(config)
    x, y = data.heldout.x, data.heldout.y
    live = trained(config, data)
    outputs = predicted(live, x)
    found: dict[str, tuple[float, float, float]] = {}

    def measure(name: str, make: Callable[[], nn.Module]) -> None:
        begun = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - begun
        answers = predicted(model, x)
        found[name] = (error(answers, y), error(answers, outputs), seconds)

    inputs = data.train.x
    with undisturbed(live):
        folds = {
            "mean": mean_fold(live, [lambda: live(inputs)]),
            "least squares": least_squares_fold(live, [lambda: live(inputs)]),
        }
    rank, taught = config.adapter.r, replace(data, train=TensorRows(inputs, predicted(live, inputs)))
    measure("base", lambda: regression_base(config.model.mlp, data))
    measure("live", lambda: live)
    for name, factors in folds.items():
        measure(name, lambda factors=factors: static(config, data, factors))
    # As `merge-export` distils: half the run's rate, from the fold.
    halved = replace(config, optimizer=replace(config.optimizer, learning_rate=config.optimizer.learning_rate / 2))
    for r in (rank, 2 * rank):
        measure(f"distilled, r={r}", lambda r=r: trained(lora_of(halved, r), taught, folds["least squares"]))
    measure(f"LoRA from scratch, r={rank}", lambda: trained(lora_of(config, rank), data))
    return found


def static(config: Config, data: RegressionData, factors: Mapping[str, FoldedLayer]) -> nn.Module:
    """The base with a fold."""
    lora = lora_of(config, config.adapter.r)
    model = apply_adapter(copy.deepcopy(regression_base(config.model.mlp, data)), lora.adapter, seed=config.seed)
    begin_with(model, factors, lora)
    return model


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs for (N, D)."""
    with undisturbed(model), torch.no_grad():
        return model(x).float()


def error(found: Tensor, wanted: Tensor) -> float:
    """Mean squared error."""
    return (found - wanted).double().square().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/README.md")
    args = parser.parse_args()
    runs = [one_seed(seed) for seed in range(args.seeds)]

    def kept(name: str) -> str:
        def share(chosen: Sequence[int]) -> float:
            base, live, own = (sum(runs[i][key][0] for i in chosen) for key in ("base", "live", name))
            return (base - own) / (base - live)

        return bootstrap_share(share, len(runs))

    lines = []
    for name in runs[0]:
        errors, distances, seconds = zip(*(run[name] for run in runs), strict=True)
        taken = "" if name in ("base", "live") else f"{statistics.median(seconds):.1f}"
        lines.append([
            name,
            f"{statistics.fmean(errors):.4f}",
            "" if name == "base" else kept(name),
            f"{statistics.fmean(distances):.4f}",
            taken,
        ])  # fmt: skip
    heads = ["model", "mean squared error", "gain kept (95 % over seeds)", "squared distance to live", "seconds"]
    text = f"Regression study, ample rows, {args.seeds} seeds; means over seeds, seconds to make it are medians.\n\n"
    text += table(heads, lines)
    print(text)
    if args.write:
        write_section("Making a memory static: regression", text)


if __name__ == "__main__":
    main()
