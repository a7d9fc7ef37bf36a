"""Paired statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, quantiles, stdev
from typing import Any

CONFIDENCE = 0.95


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Other over base for losses of the same seeds: the geometric mean of the ratios, with a t interval of their logs.

    Returns:
        ``value``, ``low``, ``high`` (None with fewer than two pairs), ``n``, ``wins``, ``losses`` of the other one
        (lower is better). The same for identical input.

    Raises:
        ValueError: a loss that is not above zero.
    """
    if any(not value > 0 for value in [*base, *other]):
        raise ValueError("ratios need losses above zero")
    logs = [math.log(b / a) for a, b in zip(base, other, strict=True)]
    result = {name: None if value is None else math.exp(value) for name, value in mean_interval(logs).items()}
    return result | counts(base, other, higher_is_better=False)


def paired_difference(base: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Other minus base for shares of the same seeds: the mean with a t interval (higher is better)."""
    differences = [b - a for a, b in zip(base, other, strict=True)]
    return mean_interval(differences) | counts(base, other, higher_is_better=True)


def counts(base: Sequence[float], other: Sequence[float], *, higher_is_better: bool) -> dict[str, Any]:
    """``n``, ``wins`` and ``losses`` of the other one; ties are neither."""
    better = sum(b > a if higher_is_better else b < a for a, b in zip(base, other, strict=True))
    worse = sum(b < a if higher_is_better else b > a for a, b in zip(base, other, strict=True))
    return {"n": len(base), "wins": better, "losses": worse}


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """``value``, ``low``, ``high``: the mean and its 95 % t interval."""
    if not values:
        return {"value": None, "low": None, "high": None}
    mean = fmean(values)
    if len(values) < 2:
        return {"value": mean, "low": None, "high": None}
    half = t_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half}


def interquartile_range(values: Sequence[float]) -> float:
    """Of at least two values."""
    first, _, third = quantiles(values, n=4, method="inclusive")
    return third - first


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, for probabilities above 0.5, to about six digits."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, degrees: int) -> float:
    """The distribution function for t >= 0, in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        total, term = 0.0, cosine
        for k in range(1, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        share = 2 / math.pi * (angle + sine * total)
    else:
        total, term = 0.0, 1.0
        for k in range(0, degrees, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        share = sine * total
    return 0.5 + share / 2
