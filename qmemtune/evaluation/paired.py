"""Two models on the same rows: the mean difference, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
SEED = 20240
CHUNK_ELEMENTS = 2**22
"""Most resampling counts held at once."""


def paired_difference(
    base: Sequence[float],
    tuned: Sequence[float],
    weights: Sequence[float] | None = None,
) -> dict[str, float | int | None]:
    """Tuned minus base over the same rows, with a 95 % percentile bootstrap interval over rows.

    Rows are resampled as pairs, so what makes a row hard for both models cancels. The bootstrap and not a t
    interval, because one method then serves both metrics: a per-row 0/1 match, and the token loss, which is a ratio
    of sums (all losses over all tokens) whose rows weigh differently. The seed is fixed: the same rows give the same
    interval. With few rows (below about 20), or where all rows agree, the interval is too narrow, as any
    resampling interval is.

    Args:
        base: a value per row: 0/1, or a row's summed loss.
        tuned: the same rows, the other model.
        weights: what a row's value is divided by in the mean: its tokens. None: one each.

    Returns:
        ``difference``, ``low``, ``high`` (None where they are not finite, or there is a single row) and ``n``, the
        number of rows.
    """
    change = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    weight = np.ones_like(change) if weights is None else np.asarray(weights, dtype=np.float64)
    if change.shape != weight.shape:
        raise ValueError(f"{len(change)} rows but {len(weight)} weights")
    n = len(change)
    if n == 0 or weight.sum() <= 0 or not np.isfinite(change).all():
        return {"difference": None, "low": None, "high": None, "n": n}
    difference = float(change.sum() / weight.sum())
    if n == 1:
        return {"difference": difference, "low": None, "high": None, "n": n}
    low, high = np.quantile(resampled_ratios(change, weight), [0.025, 0.975])
    return {"difference": difference, "low": float(low), "high": float(high), "n": n}


def resampled_ratios(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``sum(values) / sum(weights)`` of :data:`RESAMPLES` resamples of the rows (less those that weigh nothing)."""
    generator = np.random.default_rng(SEED)
    n = len(values)
    share = np.full(n, 1.0 / n)
    sums = np.stack([values, weights], axis=1)
    step = max(1, CHUNK_ELEMENTS // n)
    parts = []
    for start in range(0, RESAMPLES, step):
        counts = generator.multinomial(n, share, size=min(step, RESAMPLES - start))
        parts.append(counts @ sums)
    totals = np.concatenate(parts)
    totals = totals[totals[:, 1] > 0]
    ratios: np.ndarray = totals[:, 0] / totals[:, 1]
    return ratios
