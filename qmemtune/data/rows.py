"""Tokenised rows in flat arrays: about five bytes a token, where lists of Python integers take fifty."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

IGNORED = -100
"""Label of a token that is not in the loss."""


class _Row(NamedTuple):
    start: int
    length: int
    prompt_length: int
    spans: tuple[tuple[int, int], ...]
    instruction: str
    answer: str
    group: str
    origin: str


class TokenRows(Sequence[dict[str, Any]]):
    """Rows for training and evaluation; ``rows[i]`` is a dict, ``rows[a:b]`` and ``select`` are views.

    Each row: ``input_ids`` and ``labels`` (equally long; -100 where a token is not in the loss), ``instruction``,
    ``prompt_ids`` (what ``generate`` is fed), ``answer``, ``group``, ``origin`` ("file:line").
    """

    def __init__(self) -> None:
        self._ids = array("i")
        self._rows: list[_Row] = []

    def append(
        self,
        ids: Sequence[int],
        length: int,
        prompt_length: int,
        spans: Sequence[tuple[int, int]],
        *,
        instruction: str,
        answer: str,
        group: str,
        origin: str,
    ) -> None:
        """Add a row.

        Args:
            ids: the tokens, as many as the row or its prompt has, whichever is longer.
            length: tokens of the row itself.
            prompt_length: tokens of its prompt, from the start.
            spans: (start, end) of what is in the loss.
        """
        start = len(self._ids)
        self._ids.extend(ids)
        self._rows.append(_Row(start, length, prompt_length, tuple(spans), instruction, answer, group, origin))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | TokenRows:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = self._rows[index]
        input_ids = self._ids[row.start : row.start + row.length].tolist()
        labels = [IGNORED] * row.length
        for begin, end in row.spans:
            labels[begin:end] = input_ids[begin:end]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "instruction": row.instruction,
            "prompt_ids": self._ids[row.start : row.start + row.prompt_length].tolist(),
            "answer": row.answer,
            "group": row.group,
            "origin": row.origin,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> TokenRows:
        """The rows at ``indices``, in that order, without copying tokens."""
        view = TokenRows()
        view._ids = self._ids
        view._rows = [self._rows[i] for i in indices]
        return view

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self._rows]

    @property
    def loss_lengths(self) -> list[int]:
        """Tokens of each row that are in the loss."""
        return [sum(end - begin for begin, end in row.spans) for row in self._rows]

    @property
    def groups(self) -> list[str]:
        return [row.group for row in self._rows]
