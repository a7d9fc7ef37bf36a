"""Tokenised rows in one arrow table: four bytes a token, and read from a file without copying."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
import pyarrow as pa

IGNORED = -100
"""Label of a token that is not in the loss."""
TEXTS = ("instruction", "answer", "group", "origin")
SCHEMA = pa.schema(
    [
        ("tokens", pa.large_list(pa.int32())),
        ("length", pa.int32()),
        ("prompt_length", pa.int32()),
        ("spans", pa.large_list(pa.int32())),
        *((name, pa.large_string()) for name in TEXTS),
    ]
)
"""``tokens``: those of the row or of its prompt, whichever is longer; ``spans``: start, end, start, end, ... of what is
in the loss."""


class RowBuilder:
    """Collects tokenised rows."""

    def __init__(self) -> None:
        self._tokens, self._spans = array("i"), array("i")
        self._token_ends, self._span_ends = array("q", [0]), array("q", [0])
        self._lengths, self._prompt_lengths = array("i"), array("i")
        self._texts: dict[str, list[str]] = {name: [] for name in TEXTS}

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
        self._tokens.extend(ids)
        self._token_ends.append(len(self._tokens))
        for span in spans:
            self._spans.extend(span)
        self._span_ends.append(len(self._spans))
        self._lengths.append(length)
        self._prompt_lengths.append(prompt_length)
        # A file's name may hold bytes that are no text.
        origin = origin.encode("utf-8", "backslashreplace").decode()
        for name, text in zip(TEXTS, (instruction, answer, group, origin), strict=True):
            self._texts[name].append(text)

    def rows(self) -> TokenRows:
        """All rows so far."""

        lists = [
            pa.LargeListArray.from_arrays(numbers(ends), numbers(values))
            for ends, values in ((self._token_ends, self._tokens), (self._span_ends, self._spans))
        ]
        lengths, prompts = numbers(self._lengths), numbers(self._prompt_lengths)
        texts = [strings(self._texts[name]) for name in TEXTS]
        return TokenRows(pa.Table.from_arrays([lists[0], lengths, prompts, lists[1], *texts], schema=SCHEMA))


# From and to the bytes themselves: pyarrow would import pandas, a second's work, to convert lists and numpy's arrays.


def numbers(values: array[int]) -> pa.Array:
    kind = pa.int64() if values.typecode == "q" else pa.int32()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())])


def view(numbers: pa.Array) -> np.ndarray:
    """Whole numbers without nulls as numpy's, not copied."""
    kind = np.int64 if pa.types.is_int64(numbers.type) else np.int32
    if not len(numbers):
        return np.empty(0, kind)
    return np.frombuffer(numbers.buffers()[1], kind)[numbers.offset : numbers.offset + len(numbers)]


def strings(texts: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    ends = array("q", accumulate(map(len, encoded), initial=0))
    buffers = [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), buffers)


class TokenRows(Sequence[dict[str, Any]]):
    """Rows for training and evaluation; ``rows[i]`` is a dict, ``rows[a:b]`` and ``select`` are views.

    Each row: ``input_ids`` and ``labels`` (equally long; -100 where a token is not in the loss), ``instruction``,
    ``prompt_ids`` (what ``generate`` is fed), ``answer``, ``group``, ``origin`` ("file:line").

    Args:
        table: with :data:`SCHEMA`.
        order: numbers of the table's rows; all in their order if not given.
    """

    def __init__(self, table: pa.Table | None = None, order: np.ndarray | None = None) -> None:
        self.table = SCHEMA.empty_table() if table is None else table.combine_chunks()
        self.order = np.arange(len(self.table)) if order is None else order
        tokens, spans = self._column("tokens"), self._column("spans")
        self._tokens, self._token_ends = view(tokens.values), view(tokens.offsets)
        self._spans, self._span_ends = view(spans.values), view(spans.offsets)
        self._lengths = view(self._column("length"))
        self._prompt_lengths = view(self._column("prompt_length"))
        self._texts = {name: self._column(name) for name in TEXTS}

    def _column(self, name: str) -> Any:
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks else pa.nulls(0, column.type)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | TokenRows:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = int(self.order[index])
        start, length = int(self._token_ends[row]), int(self._lengths[row])
        input_ids = self._tokens[start : start + length].tolist()
        labels = [IGNORED] * length
        spans = self._spans[self._span_ends[row] : self._span_ends[row + 1]].tolist()
        for begin, end in zip(spans[::2], spans[1::2], strict=True):
            labels[begin:end] = input_ids[begin:end]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "prompt_ids": self._tokens[start : start + int(self._prompt_lengths[row])].tolist(),
            **{name: texts[row].as_py() for name, texts in self._texts.items()},
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenRows:
        """The rows at ``indices``, in that order and as often, without copying tokens."""
        return TokenRows(self.table, self.order[np.asarray(indices, dtype=np.int64)])

    def compact(self) -> pa.Table:
        """A table of these rows alone, in their order."""
        whole = len(self.order) == len(self.table) and bool((self.order == np.arange(len(self.table))).all())
        return self.table if whole else self.table.take(self._indices())

    def content(self) -> Iterator[bytes]:
        """Bytes that are the same for the same rows in the same order, whatever tables they lie in; ``origin`` is left
        out."""
        yield self._lengths[self.order].tobytes()
        yield self._prompt_lengths[self.order].tobytes()
        for values, ends in ((self._tokens, self._token_ends), (self._spans, self._span_ends)):
            yield np.diff(ends)[self.order].tobytes()
            for row in self.order.tolist():
                yield values[ends[row] : ends[row + 1]].tobytes()
        for name in ("instruction", "answer", "group"):
            taken = self._texts[name].take(self._indices())
            for text in taken.to_pylist():
                yield text.encode() + b"\0"

    def _indices(self) -> pa.Array:
        return numbers(array("q", self.order.tolist()))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths: list[int] = self._lengths[self.order].tolist()
        return lengths

    @property
    def loss_lengths(self) -> list[int]:
        """Tokens of each row that are in the loss."""
        # Sums of +end and -start up to each row's last span.
        signed = self._spans.astype(np.int64) * np.where(np.arange(len(self._spans)) % 2, 1, -1)
        sums = np.concatenate([[0], np.cumsum(signed)])[self._span_ends]
        counts: list[int] = np.diff(sums)[self.order].tolist() if len(self.order) else []
        return counts

    @property
    def groups(self) -> list[str]:
        groups: list[str] = self._texts["group"].take(self._indices()).to_pylist()
        return groups


def joined_rows(parts: Sequence[TokenRows]) -> TokenRows:
    """The rows of several containers, one after the other."""
    starts = np.cumsum([0, *(len(part.table) for part in parts)])
    order = [part.order + start for part, start in zip(parts, starts, strict=False)]
    table = pa.concat_tables([part.table for part in parts]) if parts else None
    return TokenRows(table, np.concatenate(order) if order else None)
