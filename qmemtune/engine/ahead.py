"""The batches of a step, read while the one before is computed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any


class BatchesAhead:
    """Takes batches from an epoch's iterator, those of the next step before they are asked for."""

    def __init__(self) -> None:
        self._source: tuple[Iterator[Any], int] | None = None
        self._read: list[Any] | Exception | None = None

    def take(self, epoch_iterator: Iterator[Any], count: int) -> list[Any]:
        """The next ``count`` batches, or those that are left.

        Raises:
            Exception: what reading them raised, be it ahead.
        """
        ahead = self._read if self._source is not None and self._source[0] is epoch_iterator else None
        self._source, self._read = (epoch_iterator, count), None
        if isinstance(ahead, Exception):
            raise ahead
        return list(islice(epoch_iterator, count)) if ahead is None else ahead

    def read(self) -> None:
        """Read what will be asked for next: as many as the last time; an epoch's last step has those that are left."""
        if self._source is None:
            return
        try:
            self._read = list(islice(*self._source))
        except Exception as error:  # noqa: BLE001 - the step that is being made is not to be lost
            self._read = error

    def end(self) -> None:
        """Let go of the iterator, and so of the processes that it reads with."""
        self._source = self._read = None
