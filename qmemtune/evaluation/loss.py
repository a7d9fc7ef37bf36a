"""Held-out loss: per row, the sum of its token losses, how many tokens that were, and how many were mistaken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qmemtune.data.collate import Collator
from qmemtune.evaluation.forward import Autocast, Instructions, model_device
from qmemtune.evaluation.labelled import LabelReader
from qmemtune.models.heap import return_freed_memory


@dataclass(frozen=True)
class RowLoss:
    """The loss of one held-out row."""

    loss_sum: float
    """Sum of the negative log-likelihoods of its labelled tokens, nats."""
    tokens: int
    """How many labelled tokens there are."""
    group: str = ""
    """The row's group; empty for none."""
    mistaken: int = 0
    """Labelled tokens that are not the most likely one, given those before them."""


def row_losses(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    batch_size: int,
    source: Instructions | None = None,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
) -> list[RowLoss]:
    """The loss of each row, in the order of ``rows``.

    Rows of like length share a batch, so that little is padded. The model's mode is the caller's matter
    (see :mod:`qmemtune.evaluation.guard`).

    Args:
        rows: dicts with ``input_ids`` and ``labels`` (lists of int), and optionally ``instruction`` and ``group``.
        pad_token_id: fills the end of short rows; never looked at.
        batch_size: rows in one forward pass.
        progress: called after each batch with the number of rows done.
    """
    reader = LabelReader(model, source=source, autocast=autocast)
    collate = Collator(pad_token_id)
    device = model_device(model)
    results: list[RowLoss | None] = [None] * len(rows)
    done = 0
    return_freed_memory()
    for indices in length_batches([len(row["input_ids"]) for row in rows], batch_size):
        batch = to_device(collate([dict(rows[i]) for i in indices]), device)
        logits = reader.read(batch)
        sums = torch.zeros(len(indices), dtype=torch.float64)
        mistaken = torch.zeros(len(indices), dtype=torch.long)
        for part, chunk in logits.chunks():
            losses = F.cross_entropy(chunk, logits.target[part], reduction="none")
            sums.index_add_(0, logits.row[part].cpu(), losses.double().cpu())
            wrong = chunk.argmax(dim=-1) != logits.target[part]
            mistaken.index_add_(0, logits.row[part].cpu(), wrong.long().cpu())
        counts = torch.bincount(logits.row.cpu(), minlength=len(indices))
        for i, loss, tokens, wrong in zip(indices, sums.tolist(), counts.tolist(), mistaken.tolist(), strict=True):
            results[i] = RowLoss(loss, tokens, str(rows[i].get("group") or ""), wrong)
        # Every batch is shorter than the one before and takes memory of its own.
        del batch, logits
        return_freed_memory()
        done += len(indices)
        if progress is not None:
            progress(done)
    return [result for result in results if result is not None]


def label_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    source: Instructions | None = None,
    autocast: Autocast = nullcontext,
) -> Iterator[torch.Tensor]:
    """Log-probabilities over the vocabulary at a batch's labelled positions, fp32, a chunk (n, V) at a time.

    Chunks have the same sizes for every model with the same vocabulary, so two models' divergence is a sum over
    ``zip`` of two such iterators. The decoder runs in this call; what remains for the iterator is the head.

    Args:
        batch: as of :meth:`LabelReader.read`, on the model's device.
    """
    logits = LabelReader(model, source=source, autocast=autocast).read(batch)
    return (F.log_softmax(chunk, dim=-1) for _, chunk in logits.chunks())


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterable[list[int]]:
    """Indices of rows in batches of like length, longest first, so that memory runs out at once or not at all."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
