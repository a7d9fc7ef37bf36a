"""Tokens of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qmemtune.data.targets import count_targets


def instructed_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Real tokens of a batch's rows that have an instruction, a scalar."""
    mask: Tensor = batch["attention_mask"]
    instructed = torch.tensor([bool(text) for text in batch["instruction"]], device=mask.device)
    return mask[instructed].sum()


def step_counts(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Labelled tokens, real tokens, and real tokens of rows with an instruction in some batches; int64 (3,)."""
    each = [
        torch.stack([count_targets(batch["labels"]), batch["attention_mask"].sum(), instructed_tokens(batch)])
        for batch in batches
    ]
    return torch.stack(each).sum(dim=0)
