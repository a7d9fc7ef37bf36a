"""What a reader hands on: a row as found, or the reason why there is none."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

EXCERPT_CHARS = 200


class RowError(Exception):
    """A row that cannot be used.

    Args:
        reason: the kind of fault, the same words for every row that has it (rows are counted by it).
        detail: what is particular to this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as found in its file."""

    values: dict[str, Any]
    """Columns by name."""
    file: str
    """File, hub data set or generator it comes from."""
    line: int
    """Line of the file where the row starts, from 1; the row's number where there are no lines."""

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"

    def rejected(self, error: RowError) -> Rejected:
        return Rejected(self.file, self.line, error.reason, error.detail, excerpt(self.values))


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row that is not used, and why."""

    file: str
    line: int
    reason: str
    detail: str = ""
    excerpt: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.file}:{self.line}: {self.reason}{detail}"


def excerpt(value: object) -> str:
    """The beginning of a row or line, for people to find it again."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, ValueError):  # nested beyond what json can write
        text = f"({kind_of(value)})"
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 3] + "..."


def kind_of(value: object) -> str:
    """The kind of a JSON-like value, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float):
        # A whole number may be too large to be asked whether it is finite.
        return "a number" if isinstance(value, int) or math.isfinite(value) else "not a number (NaN or infinity)"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bytes):
        return "bytes"
    return f"a {type(value).__name__}"


INVISIBLE = "\x00\u200b\u200c\u200d\u2060\ufeff"
"""Characters that strip() leaves, and nobody sees."""


def is_blank(text: str) -> bool:
    """Whether nothing in a text can be seen."""
    return not text.strip() or not text.strip(INVISIBLE + " \t\r\n\v\f")


def as_text(value: object, what: str) -> str:
    """``value`` itself, if it is text that a tokenizer takes.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind_of(value)}, not text")
    if not is_unicode(value):
        raise RowError(f"{what} is not valid Unicode text", "bytes that are not UTF-8, or a lone surrogate")
    return value


def is_unicode(text: str) -> bool:
    """False for text that no tokenizer takes: undecodable bytes (read as surrogates) or lone surrogate escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
