"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def short(value: Any) -> str:
    """A number with as many digits as say something; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """``loss 1.04, perplexity 2.83, exact match 61.2 %``, as far as measured."""
    parts = []
    if metrics.get("loss") is not None:
        parts.append(f"loss {metrics['loss']:.4f}")
    if metrics.get("perplexity") is not None:
        parts.append(f"perplexity {metrics['perplexity']:.2f}")
    if metrics.get("exact_match") is not None:
        parts.append(f"exact match {metrics['exact_match']:.1%}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
