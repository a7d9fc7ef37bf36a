"""Rows packed into sequences of one length, or a batch's rows one behind the other, each row still on its own.

Such a sequence has the rows' tokens one after the other, and positions that begin again at 0 with each row. From
them transformers builds, for most models, an attention mask that keeps the rows apart (in a pass without a cache; the
engine tries it before it trains); a route of the queryable memory is formed from one token alone; a row's first token
is never predicted. So every row gets the logits it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import torch

from qmemtune.data.rows import IGNORED, TokenRows


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of rows in packs of at most ``size`` tokens: best fit, longest first.

    A row longer than ``size`` is a pack of its own.
    """
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(size + 1)]
    # Bit r is set where a pack has room for r tokens: the tightest fit is the lowest bit from the length on.
    rooms = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        above = rooms >> length if length <= size else 0
        if above:
            room = length + (above & -above).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            number, room = len(packs), max(size, length)
            packs.append([])
        packs[number].append(i)
        if room - length > 0:
            by_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return packs


class PackedRows(Sequence[dict[str, Any]]):
    """Packs of rows; each has ``input_ids``, ``labels`` and ``position_ids``, lists of one length, and ``origin``,
    which says where each of its rows comes from.

    Args:
        rows: what is packed.
        size: tokens that a pack may have.
    """

    def __init__(self, rows: TokenRows, size: int) -> None:
        self.rows = rows
        self.size = size
        self.packs = pack(rows.lengths, size)

    def __len__(self) -> int:
        return len(self.packs)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        packed: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": [], "origin": [], "instruction": []}
        for i in self.packs[index]:
            row = self.rows[i]
            packed["instruction"].append(row["instruction"])
            packed["input_ids"] += row["input_ids"]
            packed["labels"] += row["labels"]
            packed["position_ids"] += range(len(row["input_ids"]))
            packed["origin"].append(row["origin"])
        return packed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pack."""
        lengths = self.rows.lengths
        return [sum(lengths[i] for i in pack) for pack in self.packs]

    @property
    def loss_lengths(self) -> list[int]:
        """Tokens in the loss of each pack."""
        lengths = self.rows.loss_lengths
        return [sum(lengths[i] for i in pack) for pack in self.packs]


@dataclass(frozen=True)
class PackCollator:
    """Pads packs on the right to the longest of them.

    Returns, when called with B packs, ``input_ids``, ``labels``, ``position_ids`` and ``attention_mask``, LongTensors
    of shape (B, T), ``instruction``, a text for each row in any pack and an empty one for padding, ``instruction_row``,
    the number of each token's text, (B, T), and ``origin``, a text for each row. The mask says which tokens are real
    and is not for the model, which would take it to mean that each sequence is one row; padding has positions of its
    own, as one more row.
    """

    pad_token_id: int

    def __call__(self, packs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(pack["input_ids"]) for pack in packs)
        columns: dict[str, list[list[int]]] = {
            name: [] for name in ("input_ids", "labels", "position_ids", "attention_mask")
        }
        for pack in packs:
            length = len(pack["input_ids"])
            rest = longest - length
            columns["input_ids"].append(pack["input_ids"] + [self.pad_token_id] * rest)
            columns["labels"].append(pack["labels"] + [IGNORED] * rest)
            columns["position_ids"].append([*pack["position_ids"], *range(rest)])
            columns["attention_mask"].append([1] * length + [0] * rest)
        batch: dict[str, Any] = {name: torch.tensor(values) for name, values in columns.items()}
        origins = [origin for pack in packs for origin in pack.get("origin", [])]
        starts = (batch["position_ids"] == 0) & (batch["attention_mask"] == 1)
        instructions = [text for pack in packs for text in pack["instruction"]]
        # Rows are counted in the order of their first tokens; padding takes the last text, which is empty.
        number = starts.flatten().cumsum(0).view_as(starts) - 1
        rows = number.where(batch["attention_mask"] == 1, len(instructions))
        return {**batch, "instruction": [*instructions, ""], "instruction_row": rows, "origin": origins}


def without_padding(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch's rows (or the rows of its packs) one behind the other, in one sequence that needs no padding.

    The shortest comes first: neighbours are of like length, as :mod:`qmemtune.models.attention` has them.

    Returns:
        What :class:`PackCollator` makes, with B = 1, and ``row_lengths``, the tokens of each row in their order.
    """
    every = sorted((row for given in rows for row in _rows_of(given)), key=lambda row: len(row["input_ids"]))
    joined = {name: [value for row in every for value in row[name]] for name in every[0]}
    # Nothing is padded.
    return {**PackCollator(pad_token_id=0)([joined]), "row_lengths": [len(row["input_ids"]) for row in every]}


def _rows_of(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a pack, or the one row, each as a pack of its own."""
    if "position_ids" not in given:
        yield {
            "input_ids": given["input_ids"],
            "labels": given["labels"],
            "position_ids": range(len(given["input_ids"])),
            "origin": [given.get("origin", "")],
            "instruction": [given.get("instruction", "")],
        }
        return
    starts = [i for i, position in enumerate(given["position_ids"]) if position == 0]
    for number, (start, end) in enumerate(pairwise([*starts, len(given["input_ids"])])):
        row = {name: given[name][start:end] for name in ("input_ids", "labels", "position_ids")}
        yield row | {name: given[name][number : number + 1] for name in ("instruction", "origin") if name in given}
