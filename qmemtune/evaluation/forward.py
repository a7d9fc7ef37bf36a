"""How every forward pass of an evaluation is run: no gradients, autocast, the rows' instructions in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from qmemtune.errors import UserError


class Instructions(Protocol):
    """What hands a batch's instruction texts to the adapter."""

    def context(self, instructions: Sequence[str]) -> AbstractContextManager[Any]:
        """A context around any forward or generate of the model; one text per row of the batch."""
        ...


class HasPrior(Instructions, Protocol):
    """Instructions that say whether they have any effect."""

    @property
    def active(self) -> bool: ...


class FixedInstruction:
    """Gives every row the same instruction, whatever its own.

    Args:
        source: where it goes.
        text: the instruction; empty for none.
    """

    def __init__(self, source: Instructions, text: str) -> None:
        self.source, self.text = source, text

    def context(self, instructions: Sequence[str]) -> AbstractContextManager[Any]:
        """See :class:`Instructions`."""
        return self.source.context([self.text] * len(instructions))


def one_for_all(source: HasPrior, text: str) -> Instructions:
    """A source that gives every row the instruction ``text``.

    Raises:
        UserError: the model has no instruction prior.
    """
    if not source.active:
        raise UserError(
            "an instruction has no effect: the model has no adapter with an instruction prior",
            where=f"instruction={text}",
            fix="leave it out, or train with adapter=queryable adapter.instruction_prior=1",
        )
    return FixedInstruction(source, text)


Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes a fresh autocast context (or ``nullcontext``) for one forward pass."""


@contextmanager
def evaluation_forward(
    instructions: Sequence[str], source: Instructions | None = None, autocast: Autocast = nullcontext
) -> Iterator[None]:
    """Context of one forward pass, or one generate, over rows with these instructions.

    ``torch.no_grad``, not ``torch.inference_mode``: inference tensors that a module or a quantised weight caches
    would break the next training step.
    """
    context = nullcontext() if source is None else source.context(list(instructions))
    with torch.no_grad(), autocast(), context:
        yield


def model_device(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: the device of its first parameter (the input embeddings)."""
    return next(model.parameters()).device
