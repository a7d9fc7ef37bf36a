"""The picture of ``qmemtune inspect``: which blocks and groups use which atoms, and how alike the atoms are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 12.0
"""Inches."""


def draw_routes(report: Mapping[str, Any], path: Path) -> None:
    """Draw a report of ``inspect`` as a PNG.

    Raises:
        ImportError: matplotlib, of the extra ``report``, is not installed.
    """
    from matplotlib.figure import Figure

    groups: Mapping[str, Any] = report["groups"]
    blocks = report["blocks"]
    heights = [0.3 * len(blocks) + 1.2, *([0.3 * len(groups) + 1.2] if groups else []), 4.2]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    labels = [f"{b['block']} ({layer_range(b['layers'])})" for b in blocks]
    heat_map(figure, figure.add_subplot(grid[0, :]), [b["use"] for b in blocks], labels, "block (layers)")
    if groups:
        uses = [mean_over_blocks(group["use"]) for group in groups.values()]
        heat_map(figure, figure.add_subplot(grid[1, :]), uses, list(groups), "group")
    similarity_map(figure, figure.add_subplot(grid[-1, 0]), report["core_similarity"])
    entropy_bars(figure.add_subplot(grid[-1, 1]), blocks)
    title = f"{report.get('run_dir', '')}: {report['rows']} rows, {report['tokens']:,} tokens"
    figure.suptitle(title + (f"\n{report['collapse']}" if report.get("collapse") else ""), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def heat_map(figure: Figure, axes: Axes, use: list[list[float]], labels: list[str], name: str) -> None:
    """Rows of weights over atoms; white is an even share."""
    from matplotlib.colors import TwoSlopeNorm

    even = 1 / len(use[0])
    most = max(2 * even, max(max(row) for row in use))
    norm = TwoSlopeNorm(even, 0.0, most)
    image = axes.imshow(use, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(labels)), labels)
    atom_ticks(axes, len(use[0]))
    axes.set_ylabel(name)
    axes.set_title(f"mean weight of each atom by {name.partition(' ')[0]}", fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)


def similarity_map(figure: Figure, axes: Axes, similarity: list[list[float]]) -> None:
    """Cosines between the atoms' cores."""
    image = axes.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    atom_ticks(axes, len(similarity))
    axes.set_title("cosine between cores", fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)


def entropy_bars(axes: Axes, blocks: list[Mapping[str, Any]]) -> None:
    """Mean route entropy of each block."""
    axes.bar([str(b["block"]) for b in blocks], [b["entropy"] for b in blocks], color="0.4")
    axes.set_ylim(0, 1)
    axes.set_xlabel("block")
    axes.set_title("mean entropy of a token's route, share of log M", fontsize=10)


def atom_ticks(axes: Axes, atoms: int) -> None:
    """Atom numbers, not too many."""
    axes.set_xticks(range(0, atoms, max(1, atoms // 16)))
    axes.set_xlabel("atom")


def mean_over_blocks(use: list[list[float]]) -> list[float]:
    """The mean of N lists of M weights."""
    return [sum(column) / len(use) for column in zip(*use, strict=True)]


def layer_range(layers: list[str]) -> str:
    """``0-4`` for several numbered layers, else their names."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 and layers[0].isdigit() else ", ".join(layers)
