"""A study's numbers as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MISSING = "no plots: matplotlib is not installed -> pip install 'qmemtune[report]'"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw(study: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every metric by setting and variant, and the loss over the grid of learning rates.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for metric in study["metrics"]:
        figure, axes = pyplot.subplots(figsize=(1.5 + 2.2 * len(study["settings"]), 3.2), layout="constrained")
        if draw_metric(axes, study, metric["name"]):
            files.append(folder / f"{metric['name']}.png")
            figure.savefig(files[-1], dpi=150)
        pyplot.close(figure)
    for setting in dict.fromkeys(entry["setting"] for entry in study["stability"]):
        figure, axes = pyplot.subplots(figsize=(4.5, 3.2), layout="constrained")
        draw_grid(axes, study, setting)
        files.append(folder / f"learning_rates_{setting}.png")
        figure.savefig(files[-1], dpi=150)
        pyplot.close(figure)
    return files


def draw_metric(axes: Any, study: Mapping[str, Any], metric: str) -> bool:
    """Each run a point, each variant's mean a line; whether there was anything to draw."""
    variants = [variant["name"] for variant in study["variants"]]
    settings = [setting["name"] for setting in study["settings"]]
    usual = {(e["setting"], e["variant"]): e["learning_rate"] for e in study["comparisons"]}
    drawn = False
    for number, variant in enumerate(variants):
        places, values = [], []
        for place, setting in enumerate(settings):
            own = [
                cell["metrics"].get(metric)
                for cell in study["cells"]
                if (cell["setting"], cell["variant"]) == (setting, variant)
                and cell["learning_rate"] == usual.get((setting, variant))
                and cell["seed"] in study["seeds"]
            ]
            found = [value for value in own if value is not None]
            x = place + 0.8 * ((number + 0.5) / len(variants) - 0.5)
            places += [x] * len(found)
            values += found
            if found:
                mean = sum(found) / len(found)
                axes.plot([x - 0.25 / len(variants), x + 0.25 / len(variants)], [mean, mean], color=f"C{number % 10}")
        drawn = drawn or bool(values)
        axes.scatter(places, values, s=10, alpha=0.6, color=f"C{number % 10}", label=variant)
    axes.set_xticks(range(len(settings)), settings)
    axes.set_ylabel(metric.replace("_", " "))
    axes.legend(fontsize="small")
    return drawn


def draw_grid(axes: Any, study: Mapping[str, Any], setting: str) -> None:
    """Mean final loss over the learning rate."""
    for entry in study["stability"]:
        if entry["setting"] == setting:
            axes.plot(study["learning_rates"], entry["loss_by_learning_rate"], marker="o", label=entry["variant"])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss")
    axes.set_title(setting, fontsize="medium")
    axes.legend(fontsize="small")
