"""Brings each row's instruction text to the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qmemtune.adapters.queryable import memory_of
from qmemtune.adapters.queryable.encoders import InstructionEncoder, make_encoder


class InstructionSource:
    """Gives the rows of a forward pass their instructions, as embeddings.

    An embedding is computed once for each distinct text. Without a queryable memory, or with its instruction prior
    off, the contexts do nothing.

    Args:
        model: the adapted model.
        tokenizer: the base model's.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.memory = memory_of(model)
        self._encoder: InstructionEncoder | None = None
        self._known: dict[str, Tensor] = {}
        config = None
        if self.memory is not None:
            config = next((c for c in self.memory.configs.values() if c.instruction_prior), None)
        if config is not None:
            self._encoder = make_encoder(config, model, tokenizer)

    @property
    def active(self) -> bool:
        """Whether instructions have any effect on this model."""
        return self._encoder is not None

    def context(self, instructions: Sequence[str]) -> AbstractContextManager[None]:
        """A context around any forward pass or ``generate``; ``""`` is a row without an instruction.

        Args:
            instructions: one text a row. In ``generate``, rows that are expanded (beams, several sequences) keep
                the instruction of the row they come from.
        """
        if self._encoder is None or self.memory is None:
            return nullcontext()
        return self.memory.instructed(self.embed(instructions))

    def embed(self, instructions: Sequence[str]) -> Tensor:
        """Unit-norm embeddings, (B, E); zeros for ``""``."""
        assert self._encoder is not None, "the model has no instruction prior"
        new = sorted({text for text in instructions if text and text not in self._known})
        if new:
            for text, embedding in zip(new, self._encoder.encode(new), strict=True):
                self._known[text] = embedding
        zero = torch.zeros(self._encoder.dim, device=self._encoder.device)
        return torch.stack([self._known[text] if text else zero for text in instructions])
