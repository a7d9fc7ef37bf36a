"""How training rows form batches: by like length, packed, or at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from qmemtune.config.schema import Config
from qmemtune.data.collate import Collator
from qmemtune.data.packing import PackCollator, PackedRows
from qmemtune.data.rows import TokenRows
from qmemtune.data.sampler import LengthGroupedSampler
from qmemtune.engine.sampler import SeededRandomSampler
from qmemtune.errors import UserError
from qmemtune.evaluation.guard import undisturbed
from qmemtune.models.hardware import autocast

APART = 0.05
"""Largest distance of a packed row's logits from those of the row alone, as a share of what a leak would make of it."""


class Batching:
    """Training rows as batches see them.

    Args:
        config: the run.
        rows: tokenised training rows.
        pad_token_id: fills the end of short rows.
    """

    def __init__(self, config: Config, rows: TokenRows, pad_token_id: int) -> None:
        self.config = config
        self.packed = config.trainer.packing
        self.source_rows = len(rows)
        self.rows: TokenRows | PackedRows = PackedRows(rows, config.data.max_length) if self.packed else rows
        self.collator = PackCollator(pad_token_id) if self.packed else Collator(pad_token_id)

    def line(self, world_size: int = 1) -> str:
        """One line that says how batches are made, and how much of the first epoch's is padding."""
        padding = padding_share(self.rows.lengths, self.config, world_size)
        if self.packed:
            size = self.config.data.max_length
            how = f"{self.source_rows:,} rows packed into {len(self.rows):,} sequences of up to {size:,} tokens"
        elif self.config.trainer.length_grouping:
            how = "rows of like length together (trainer.packing=true packs them)"
        else:
            how = "rows at random"
        return f"batches: {how}; {padding:.1%} padding"


def row_order(lengths: Sequence[int], config: Config, world_size: int) -> Sampler[int]:
    """The order in which rows (or packs) of these lengths, in tokens, are trained on."""
    trainer = config.trainer
    if trainer.length_grouping and not trainer.packing:
        return LengthGroupedSampler(lengths, trainer.per_device_train_batch_size * world_size, config.seed)
    return SeededRandomSampler(len(lengths), config.seed)


def padding_share(lengths: Sequence[int], config: Config, world_size: int) -> float:
    """Padding among the tokens of the first epoch's batches."""
    order = list(row_order(lengths, config, world_size))
    size = config.trainer.per_device_train_batch_size
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    whole = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / whole if whole else 0.0


def check_rows_stay_apart(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Find out whether this model's attention keeps packed rows apart, by packing two.

    Raises:
        UserError: it does not, or takes no positions.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(13).mul(7919).remainder(vocabulary).unsqueeze(0).to(device)
    first, second = ids[:, :6], ids[:, 6:]
    positions = torch.cat([torch.arange(6), torch.arange(7)]).unsqueeze(0).to(device)

    def logits(**inputs: Any) -> Tensor:
        found: Tensor = model(**inputs, use_cache=False).logits.float()
        return found

    fix = "train without trainer.packing, or with model.attn_implementation=sdpa"
    try:
        with undisturbed(model), torch.no_grad(), autocast(device, dtype):
            alone = torch.cat([logits(input_ids=first), logits(input_ids=second)], dim=1)
            packed = logits(input_ids=ids, position_ids=positions)
            joined = logits(input_ids=ids)
    except TypeError as error:
        raise UserError(f"this model takes no positions: {error}", where="trainer.packing", fix=fix) from error
    distance, leak = (packed - alone)[:, 6:].norm(), (joined - alone)[:, 6:].norm()
    if distance > APART * leak + 1e-4 * alone.norm():
        raise UserError(
            "this model's attention does not keep packed rows apart "
            f"(distance {distance:.3g}, where a leak of the whole row would make {leak:.3g})",
            where="trainer.packing",
            fix=fix,
        )
