"""One value given to one key, and who gave it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT = "default"
"""Source of a value that nothing set."""


@dataclass(frozen=True)
class Setting:
    """A value for a dotted key.

    ``value`` is what YAML made of it, or for an override the text itself (``is_text``). ``raw`` is the text of a YAML
    scalar as written (or a list of texts), which a ``str`` field prefers: a revision such as 6e12345 is no number.
    ``reset`` returns a key to its default.
    """

    key: str
    value: Any
    source: str
    """File, or override as given."""
    line: int | None = None
    raw: Any = None
    is_text: bool = False
    reset: bool = False

    @property
    def where(self) -> str:
        """Source with its line."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


def flatten(values: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[Setting]:
    """Settings of a nested mapping of plain values."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, source, f"{key}.")
        else:
            yield Setting(key, value, source)
