"""How every forward pass of an evaluation is run: no gradients, autocast, the rows' instructions in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn


class Instructions(Protocol):
    """What hands a batch's instruction texts to the adapter."""

    def context(self, instructions: Sequence[str]) -> AbstractContextManager[Any]:
        """A context around any forward or generate of the model; one text per row of the batch."""
        ...


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
