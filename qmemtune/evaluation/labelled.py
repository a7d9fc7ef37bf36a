"""Logits at labelled positions only.

Of a held-out row only some positions have a label, and a vocabulary has 50k to 150k entries: the full (B, T, V)
logits are mostly waste, and in fp32 they do not fit. A hook on the output head lets the decoder run as always and
hands the head only the labelled positions.

Tensor letters: B rows, T tokens, D model width, N labelled positions of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qmemtune.adapters import memory_of, prompts_of
from qmemtune.data.rows import IGNORED
from qmemtune.data.targets import shifted_targets
from qmemtune.evaluation.forward import Autocast, Instructions, evaluation_forward
from qmemtune.models.head import Transform, matching_transform, output_head

CHUNK_ELEMENTS = 2**24
"""Most fp32 logits held at once: 64 MiB."""
PROBE_POSITIONS = 2


@dataclass
class LabelledLogits:
    """The logits of one batch at its N labelled positions, made a chunk at a time.

    Attributes:
        row: (N,) index of each position's row in the batch, ascending.
        target: (N,) token id to be predicted there.
    """

    row: torch.Tensor
    target: torch.Tensor
    _states: torch.Tensor
    """(N, D) inputs of the head, or (N, V) logits if there is no head to apply."""
    _head: nn.Module | None
    _transform: Transform | None
    """What the model does to the head's output."""
    _autocast: Autocast

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Pairs of a slice of the N positions and its logits, fp32 (n, V), with no gradient."""
        size = self._chunk_size()
        for start in range(0, len(self.target), size):
            part = slice(start, start + size)
            yield part, self.at(part)

    def at(self, part: slice) -> torch.Tensor:
        """The logits of a slice of the N positions, fp32 (n, V), with no gradient."""
        with torch.no_grad(), self._autocast():
            states = self._states[part]
            logits = states if self._head is None else self._head(states[None])[0]
            logits = logits if self._transform is None else self._transform(logits)
        return logits.float()

    def _chunk_size(self) -> int:
        width = self._states.shape[-1] if self._head is None else head_width(self._head)
        return max(1, CHUNK_ELEMENTS // max(1, width))


class LabelReader:
    """Reads a model's logits at labelled positions, batch by batch.

    What the model does after its head (soft-capping, a logit scale) is found by comparing, not by a list of
    architectures: the model's own logits at two positions against the head's. If nothing known makes the one of the
    other, the model itself is run on all labelled positions; if it does not bring those back either, on all
    positions. What was found holds for the following batches.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        source: gives the rows' instructions to the adapter.
        autocast: makes the autocast context of a forward pass.
    """

    def __init__(
        self, model: nn.Module, *, source: Instructions | None = None, autocast: Autocast = nullcontext
    ) -> None:
        self.model = model
        self.source = source
        self.autocast = autocast
        self._head = find_head(model)
        self._memory = memory_of(model)
        self._mode = "all positions" if self._head is None else "head"

    def read(self, batch: Mapping[str, Any]) -> LabelledLogits:
        """Run the model on a batch.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T), labels -100 where there is none, and
                optionally ``instruction``, a text per row.
        """
        targets = shifted_targets(batch["labels"])
        labelled = targets != IGNORED
        row, target = labelled.nonzero()[:, 0], targets[labelled]
        if len(target) == 0:
            return LabelledLogits(row, target, torch.zeros(0, 1), None, None, self.autocast)
        if self._mode == "head":
            found = self._through_head(batch, labelled)
            if found is not None:
                return LabelledLogits(row, target, found[0], self._head, found[1], self.autocast)
            self._mode = "labelled positions"
        if self._mode == "labelled positions":
            logits = self._through_model(batch, labelled)
            if logits is not None:
                return LabelledLogits(row, target, logits, None, None, self.autocast)
            self._mode = "all positions"
        logits = self._forward(batch)[labelled]
        return LabelledLogits(row, target, logits, None, None, self.autocast)

    def _through_head(self, batch: Mapping[str, Any], labelled: torch.Tensor) -> tuple[torch.Tensor, Transform] | None:
        """(N, D) head inputs, and what makes the model's logits of the head's output; None if that is not known."""
        assert self._head is not None
        with _HeadTap(self._head, labelled, PROBE_POSITIONS) as tap:
            logits = self._forward(batch)
        states = tap.states
        if states is None:
            return None
        with torch.no_grad(), self.autocast():
            bare = self._head(states[None, :PROBE_POSITIONS])
            transform = matching_transform(self.model, bare, logits)
        return None if transform is None else (states, transform)

    def _through_model(self, batch: Mapping[str, Any], labelled: torch.Tensor) -> torch.Tensor | None:
        """(N, V) logits that the model itself makes of the labelled positions; None if it cannot."""
        assert self._head is not None
        with _HeadTap(self._head, labelled, None) as tap:
            logits = self._forward(batch)
        if tap.states is None or logits.shape[:2] != (1, len(tap.states)):
            return None
        return logits[0]

    def _forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        instructions = batch.get("instruction") or [""] * len(batch["input_ids"])
        prompts = prompts_of(self._memory, batch["labels"], IGNORED)
        with evaluation_forward(instructions, self.source, self.autocast), prompts:
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits: torch.Tensor = output.logits
        return logits


class _HeadTap:
    """While open, the head is given labelled positions only: (B, T, D) becomes (1, n, D).

    Args:
        head: the output head.
        labelled: (B, T) True where the *next* token has a label.
        first: hand on so many positions; None: all N.
    """

    def __init__(self, head: nn.Module, labelled: torch.Tensor, first: int | None) -> None:
        self.head, self.labelled, self.first = head, labelled, first
        self.states: torch.Tensor | None = None

    def __enter__(self) -> _HeadTap:
        self._handle = self.head.register_forward_pre_hook(self._select)
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()

    def _select(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != self.labelled.shape:
            return None
        self.states = hidden[self.labelled.to(hidden.device)]
        return (self.states[None, : self.first], *args[1:])


def find_head(model: nn.Module) -> nn.Module | None:
    """The output head, if it can be run on positions out of their rows.

    An adapted head cannot: its adapter may hold something per token of the batch.
    """
    head = output_head(model)
    return None if isinstance(head, BaseTunerLayer) else head


def head_width(head: nn.Module) -> int:
    """V, from the head itself or its weight; a safe guess if it tells neither."""
    width = getattr(head, "out_features", None)
    weight = getattr(head, "weight", None)
    if width is None and weight is not None:
        width = weight.shape[0]
    return int(width or 2**18)
