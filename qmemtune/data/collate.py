"""Rows to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qmemtune.data.rows import IGNORED


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of them.

    Returns, when called with B rows, ``input_ids``, ``attention_mask`` and ``labels``, LongTensors of shape (B, T), and
    ``instruction`` and ``origin`` (file and line), lists of B texts.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    """Round T up to a multiple of this: fewer shapes for compiled kernels."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        shape = (len(rows), longest)
        input_ids_BT = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask_BT = torch.zeros(shape, dtype=torch.long)
        labels_BT = torch.full(shape, IGNORED, dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids_BT[i, :length] = torch.tensor(row["input_ids"], dtype=torch.long)
            attention_mask_BT[i, :length] = 1
            labels_BT[i, :length] = torch.tensor(row["labels"], dtype=torch.long)
        return {
            "input_ids": input_ids_BT,
            "attention_mask": attention_mask_BT,
            "labels": labels_BT,
            "instruction": [row.get("instruction", "") for row in rows],
            "origin": [row.get("origin", "") for row in rows],
        }


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model takes of a training batch: tokens, labels, and either what is real or, of several rows in a
    sequence, positions; a mask would tell transformers that each sequence is one row."""
    places = "position_ids" if "position_ids" in batch else "attention_mask"
    return {name: batch[name] for name in ("input_ids", "labels", places)}
