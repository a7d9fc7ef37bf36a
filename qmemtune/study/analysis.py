"""From the cells' results to a study's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, stdev
from typing import Any

from qmemtune.study.cells import Cell, Plan
from qmemtune.study.design import LOSS, Metric, Setting, Variant
from qmemtune.study.statistics import interquartile_range, mean_interval, paired_difference, paired_ratio

Result = Mapping[str, Any]
DIGITS = 6
"""Significant digits that are kept."""


def analyse(plan: Plan, results: Sequence[Result], tuning_seeds: Sequence[int]) -> dict[str, Any]:
    """A study's results and statistics.

    A run that diverged (its loss is no number, or above that of the unadapted base) counts with the base's loss.

    Args:
        plan: the study's cells.
        results: of the cells that are done.
        tuning_seeds: seeds on which settings were chosen; the others confirm.

    Returns:
        ``settings``, ``variants``, ``seeds``, ``tuning_seeds``, ``baseline``; ``comparisons``, one entry a setting and
        variant; ``stability``, the same over the grid of learning rates; ``cells``, the numbers themselves.
    """
    known = {(r["setting"], r["variant"], r["learning_rate"], r["seed"]): r for r in results}
    main = {
        (setting.name, variant.name): by_seed(known, plan, setting, variant)
        for setting in plan.settings
        for variant in plan.variants
    }
    tuning = [seed for seed in plan.seeds if seed in tuning_seeds]
    return rounded(
        {
            "baseline": plan.variants[0].name,
            "seeds": plan.seeds,
            "tuning_seeds": tuning,
            "settings": [{"name": s.name, "about": s.about} for s in plan.settings],
            "variants": [{"name": v.name, "about": v.about} for v in plan.variants],
            "metrics": [asdict(metric) for metric in measured(plan.study.metrics, results)],
            "comparisons": [
                compared(plan, setting, variant, main, tuning) for setting in plan.settings for variant in plan.variants
            ],
            "learning_rates": plan.learning_rates,
            "grid_seeds": plan.grid_seeds,
            "stability": [entry for setting in plan.settings for entry in stability(plan, setting, known)],
            "cells": [compact(result) for result in results],
        }
    )


def by_seed(known: Mapping[Any, Result], plan: Plan, setting: Setting, variant: Variant) -> dict[int, Result]:
    """The results of a variant in a setting outside the grid, by seed."""
    cell = main_cell(plan, setting, variant)
    if cell is None:
        return {}
    found = {seed: known.get((setting.name, variant.name, cell.learning_rate, seed)) for seed in plan.seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def main_cell(plan: Plan, setting: Setting, variant: Variant) -> Cell | None:
    """One of the cells of a variant in a setting outside the grid; None if the study has no seeds."""
    # The first of a seed: those of the grid follow. A seed of the grid alone has no other.
    return next(
        (c for c in plan.cells if (c.setting, c.variant) == (setting.name, variant.name) and c.seed in plan.seeds), None
    )


def compared(
    plan: Plan,
    setting: Setting,
    variant: Variant,
    main: Mapping[tuple[str, str], Mapping[int, Result]],
    tuning: Sequence[int],
) -> dict[str, Any]:
    """One variant in one setting beside the baseline, on all seeds, on those of tuning and on the others."""
    own, base = main[setting.name, variant.name], main[setting.name, plan.variants[0].name]
    cell = main_cell(plan, setting, variant)
    entry: dict[str, Any] = {
        "setting": setting.name,
        "variant": variant.name,
        "parameters": cell.parameters if cell else None,
        "learning_rate": cell.learning_rate if cell else None,
        "diverged": sum(diverged(result) for result in own.values()),
        "seconds": fmean([r["seconds"] for r in own.values()]) if own else None,
        "metrics": {},
        "groups": {},
    }
    for metric in plan.study.metrics:
        entry["metrics"][metric.name] = one_metric(metric, own, base, tuning, partial(value_of, metric=metric))
    for group in group_names(own):
        entry["groups"][group] = {
            metric.name: one_metric(metric, own, base, tuning, partial(value_in, metric=metric, group=group))
            for metric in plan.study.metrics
        }
    return entry


def one_metric(
    metric: Metric,
    own: Mapping[int, Result],
    base: Mapping[int, Result],
    tuning: Sequence[int],
    read: Callable[[Result], float | None],
) -> dict[str, Any]:
    """Mean and spread, and the comparison with the baseline, of one metric."""
    values = {seed: value for seed, result in own.items() if (value := read(result)) is not None}
    others = {seed: value for seed, result in base.items() if (value := read(result)) is not None}
    both = sorted(set(values) & set(others))
    compare = paired_ratio if metric.compare == "ratio" else paired_difference

    def on(seeds: Sequence[int]) -> dict[str, Any] | None:
        if not seeds or (metric.compare == "ratio" and any(not v[s] > 0 for v in (values, others) for s in seeds)):
            return None
        return compare([others[seed] for seed in seeds], [values[seed] for seed in seeds])

    kept = list(values.values())
    return {
        "mean": fmean(kept) if kept else None,
        "sd": stdev(kept) if len(kept) > 1 else None,
        "n": len(kept),
        "all": on(both),
        "tuning": on([seed for seed in both if seed in tuning]),
        "confirmation": on([seed for seed in both if seed not in tuning]),
    }


def measured(metrics: Sequence[Metric], results: Sequence[Result]) -> list[Metric]:
    """The metrics that some run has (a study may be run without generation), and the loss in any case."""
    return [m for m in metrics if m.name == LOSS.name or any(value_of(result, m) is not None for result in results)]


def value_of(result: Result, metric: Metric) -> float | None:
    """A run's number; the base's loss where the run diverged."""
    if metric.name == LOSS.name:
        return final_loss(result)
    found: float | None = result["metrics"].get(metric.name)
    return found


def value_in(result: Result, metric: Metric, group: str) -> float | None:
    """The same for the rows of a group."""
    found: float | None = result["metrics"].get("groups", {}).get(group, {}).get(metric.name)
    return found


def group_names(results: Mapping[int, Result]) -> list[str]:
    """Names of the groups that the results have."""
    return sorted({name for result in results.values() for name in result["metrics"].get("groups", {})})


def diverged(result: Result) -> bool:
    """Whether a run ended above its base, or without a loss at all."""
    loss, before = result["metrics"].get("loss"), result["base_loss"]
    return bool(result["diverged"] or loss is None or (before is not None and loss > before))


def final_loss(result: Result) -> float | None:
    """A run's held-out loss; that of its base if it diverged."""
    loss: float | None = result["base_loss"] if diverged(result) else result["metrics"]["loss"]
    return loss


def stability(plan: Plan, setting: Setting, known: Mapping[Any, Result]) -> list[dict[str, Any]]:
    """How much each variant's final loss depends on the learning rate in a setting; empty where there is no grid."""
    entries = []
    ranges: dict[str, dict[int, float]] = {}
    for variant in plan.variants:
        grid = {
            seed: [known.get((setting.name, variant.name, rate, seed)) for rate in plan.learning_rates]
            for seed in plan.grid_seeds
        }
        whole = {seed: [r for r in runs if r is not None] for seed, runs in grid.items() if runs and None not in runs}
        if not whole or len(plan.learning_rates) < 2:
            continue
        losses = {seed: [final_loss(run) for run in runs] for seed, runs in whole.items()}
        # A run that diverged has no loss where its base's was not measured.
        finite = {seed: [v for v in row if v is not None] for seed, row in losses.items()}
        ranges[variant.name] = own = {seed: interquartile_range(row) for seed, row in finite.items() if len(row) > 1}
        columns = [[v for v in column if v is not None] for column in zip(*losses.values(), strict=True)]
        by_rate = [fmean(column) if column else None for column in columns]
        means = {rate: loss for rate, loss in zip(plan.learning_rates, by_rate, strict=True) if loss is not None}
        if not means or not own:
            continue
        runs = [run for row in whole.values() for run in row]
        entries.append(
            {
                "setting": setting.name,
                "variant": variant.name,
                "seeds": len(whole),
                "iqr": fmean(own.values()),
                "diverged": sum(map(diverged, runs)) / len(runs),
                "loss_by_learning_rate": by_rate,
                "best_learning_rate": min(means, key=lambda rate: means[rate]),
                "best_loss": min(means.values()),
                "worst_loss": max(means.values()),
            }
        )
        base = ranges.get(plan.variants[0].name, {})
        both = sorted(set(base) & set(own))
        entries[-1]["iqr_difference"] = mean_interval([own[seed] - base[seed] for seed in both])
    return entries


def compact(result: Result) -> dict[str, Any]:
    """A cell's result as it is kept: what the tables are made of, and what it took."""
    names = ("setting", "variant", "seed", "learning_rate", "trainable_parameters", "diverged", "base_loss", "seconds")
    kept = {name: result.get(name) for name in names}
    metrics = dict(result["metrics"])
    groups = metrics.pop("groups", None)
    shown = ("loss", "row_accuracy", "exact_match")
    if groups:
        metrics["groups"] = {g: {name: row[name] for name in shown if name in row} for g, row in groups.items()}
    return kept | {"metrics": metrics, "digest": result["digest"]}


def rounded(value: Any) -> Any:
    """Floats with :data:`DIGITS` significant digits, so that a file of results can be read and compared."""
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
