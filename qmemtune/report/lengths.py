"""The picture of ``qmemtune data``: how long rows are, and how much of them is in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any


def draw_lengths(report: Mapping[str, Any], path: Path) -> None:
    """Draw a survey of rows as a PNG.

    Args:
        report: of :func:`qmemtune.data.survey.survey`.
        path: where to write it.

    Raises:
        ImportError: matplotlib, of the extra ``report``, is not installed.
    """
    from matplotlib.figure import Figure

    lengths, train = report["lengths"], report["train"]
    edges = lengths["edges"]
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[6, 1])
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    width = (edges[1] - edges[0]) * 0.45
    upper.bar([x - width / 2 for x in centres], lengths["train"], width, label=f"train ({train['rows']:,} rows)")
    heldout = report["heldout"]["rows"]
    if heldout:
        upper.bar([x + width / 2 for x in centres], lengths["heldout"], width, label=f"held out ({heldout:,} rows)")
    if train["truncated"]:
        label = f"max_length: {train['truncated']:,} rows cut"
        upper.axvline(report["max_length"], color="black", linestyle=":", label=label)
    upper.set_xlabel("tokens of a row")
    upper.set_ylabel("rows")
    upper.legend(frameon=False)
    share = report["loss_share"]
    lower.barh([0], [share], label=f"in the loss ({share:.0%})")
    lower.barh([0], [1 - share], left=[share], color="lightgrey", label="context")
    lower.set_xlim(0, 1)
    lower.set_yticks([])
    lower.set_xlabel("share of the training tokens")
    lower.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
