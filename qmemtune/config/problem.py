"""What a check across fields finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qmemtune.config.schema import Config

Problem = tuple[str, str, str | None]
"""The key whose source a message should name, the problem, the way out."""
Check = Callable[[Config], Iterator[Problem]]


def value_of(config: Config, key: str) -> object:
    """The value of a dotted key."""
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
