"""Brings each row's instruction text to the adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qmemtune.adapters.queryable import QueryableMemory, memory_of
from qmemtune.adapters.queryable.encoders import InstructionEncoder, make_encoder
from qmemtune.rundir import cache_root

KEPT_EMBEDDINGS = 4096
"""Embeddings that a source keeps, the last ones used: 64 MiB of a base of width 4,096."""


class InstructionSource:
    """Gives the rows of a forward pass their instructions, as embeddings.

    The embeddings of the last texts are kept in main memory, and those of a sentence encoder for all runs on the disk
    (``$QMEMTUNE_CACHE``/instructions). Several adapters in one model may have different encoders. Without a queryable
    memory, or with its instruction prior off, the contexts do nothing.

    Args:
        model: the adapted model.
        tokenizer: the base model's.
        places: folders that are an adapter's sentence encoder or hold it under its name (see
            :func:`~qmemtune.adapters.queryable.encoders.make_encoder`).

    Raises:
        UserError: an adapter's encoder is not found or is another one.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, places: Sequence[str | Path] = ()
    ) -> None:
        self.memory = memory_of(model)
        self._model, self._tokenizer, self._places = model, tokenizer, tuple(places)
        self._encoders: dict[str, tuple[str, InstructionEncoder]] = {}
        """Adapter -> what its encoder is known by, and the encoder; equal ones are shared."""
        self._known: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        """Encoder and text -> embedding, on the CPU; the last one used comes last."""
        self._meet_adapters()

    @property
    def active(self) -> bool:
        """Whether instructions have any effect on this model."""
        return bool(self._encoders)

    def context(self, instructions: Sequence[str], rows: Tensor | None = None) -> AbstractContextManager[None]:
        """A context around any forward pass or ``generate``; ``""`` is a row without an instruction.

        Args:
            instructions: one text a row. In ``generate``, rows that are expanded (beams, several sequences) keep
                the instruction of the row they come from.
            rows: of packed rows, which of the texts each token has, (B, T).
        """
        self._meet_adapters()
        if self.memory is None or not self._encoders:
            return nullcontext()
        return self.memory.instructed({name: self.embed(instructions, name) for name in self._encoders}, rows)

    def of(self, model: nn.Module) -> InstructionSource:
        """A source for another model, whose encoders are looked for in the same places."""
        return InstructionSource(model, self._tokenizer, places=self._places)

    def embed(self, instructions: Sequence[str], adapter: str | None = None) -> Tensor:
        """Unit-norm embeddings, (B, E); zeros for ``""``.

        Args:
            adapter: whose encoder to use; the first one's if not given.
        """
        assert self._encoders, "the model has no instruction prior"
        key, encoder = self._encoders[adapter or next(iter(self._encoders))]
        texts = sorted({text for text in instructions if text})
        # Taken out and put back as the last ones used. Another thread may do the same, so nothing is asked for twice.
        known = {text: self._known.pop((key, text), None) for text in texts}
        found = {text: embedding for text, embedding in known.items() if embedding is not None}
        new = [text for text in texts if text not in found]
        if new:
            # Copies: a row of the encoder's result would keep all of it.
            found.update((text, row.clone()) for text, row in zip(new, encoder.encode(new).cpu(), strict=True))
        self._known.update(((key, text), embedding) for text, embedding in found.items())
        while len(self._known) > KEPT_EMBEDDINGS:
            self._known.popitem(last=False)
        zero = torch.zeros(encoder.dim)
        return torch.stack([found[text] if text else zero for text in instructions]).to(encoder.device)

    def _meet_adapters(self) -> None:
        """Make the encoders of adapters that are new, and forget those of deleted ones."""
        configs = {} if self.memory is None else {n: c for n, c in self.memory.configs.items() if c.has_prior}
        self._encoders = {name: known for name, known in self._encoders.items() if name in configs}
        for name, config in configs.items():
            if name in self._encoders:
                continue
            encoder = make_encoder(config, self._model, self._tokenizer, places=self._places, cache=cache_folder())
            key = config.prior_encoder_digest or config.prior_encoder
            shared = next((known for known in self._encoders.values() if known[0] == key), None)
            self._encoders[name] = shared or (key, encoder)


def prompts_of(model: nn.Module | QueryableMemory | None, labels: Tensor, ignored: int) -> AbstractContextManager[None]:
    """A context that tells a memory with routes of whole rows which tokens are prompts: those before the first label.

    Args:
        model: a model, or its memory.
        labels: (B, T), ``ignored`` where there is none.
    """
    memory = model if model is None or isinstance(model, QueryableMemory) else memory_of(model)
    if memory is None or all(config.granularity == "token" for config in memory.configs.values()):
        return nullcontext()
    return memory.prompted((labels != ignored).cumsum(dim=-1) == 0)


def cache_folder() -> Path:
    """Folder of the embeddings that sentence encoders made."""
    return cache_root() / "instructions"
