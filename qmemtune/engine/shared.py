"""What several runs of one process load in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

Loaded = TypeVar("Loaded")


class Loads:
    """Keeps the latest base model, tokenizer and rows of a process, for the next run that wants the same.

    A run changes the base model it adapts, so that each is given a copy of its own: nothing it does can reach the
    next one. Rows and tokenizers are handed out as they are; runs only read them.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        """Whether another run follows; otherwise nothing is held or copied."""
        self._held: dict[str, tuple[str, Any]] = {}

    def same(self, kind: str, key: Any, load: Callable[[], Loaded]) -> Loaded:
        """What ``load`` makes, or made for the same key before.

        Args:
            kind: one value is kept of each kind.
            key: all that the value depends on; compared by its ``repr``.
        """
        if not self.keep:
            return load()
        known = self._held.get(kind)
        if known is None or known[0] != repr(key):
            self._held.pop(kind, None)
            known = self._held[kind] = (repr(key), load())
        value: Loaded = known[1]
        return value

    def own_copy(self, kind: str, key: Any, load: Callable[[], Loaded]) -> Loaded:
        """The same, as a copy that the caller may change."""
        value = self.same(kind, key, load)
        return copy.deepcopy(value) if self.keep else value
