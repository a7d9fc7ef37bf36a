"""Plain values within one another, as JSON and YAML have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def with_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` of each of its parts that holds no others; tuples become lists, keys stay."""
    if isinstance(value, Mapping):
        return {key: with_leaves(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_leaves(part, change) for part in value]
    return change(value)
