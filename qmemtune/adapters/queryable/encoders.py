"""Encoders of instruction texts: the base model's own input embeddings, or a sentence-transformers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.adapters.queryable.sentence import SentenceEncoder, folder_digest, is_encoder
from qmemtune.errors import UserError


class InstructionEncoder(Protocol):
    """Embeds texts. E is ``dim``."""

    dim: int
    device: torch.device

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings, (len(texts), E), float32."""
        ...


class BaseEmbeddingEncoder:
    """Mean of the base model's frozen input embeddings over an instruction's tokens: no extra model."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        embedding = model.get_input_embeddings()
        # Where PEFT trains the embeddings (modules_to_save), the frozen ones stand beside them.
        embedding = getattr(embedding, "original_module", embedding)
        # Through a list, so that the module is shared and stays where it is.
        self._embedding = [embedding]
        self.tokenizer = tokenizer
        weight = self._embedding[0].weight
        self.dim = int(weight.shape[-1])
        self.device = weight.device

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`InstructionEncoder`."""
        rows = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            weight = self._embedding[0].weight
            index = torch.tensor(ids, device=weight.device, dtype=torch.long)
            rows.append(weight[index].float().mean(dim=0) if ids else weight.new_zeros(self.dim).float())
        return F.normalize(torch.stack(rows), dim=-1)


def make_encoder(
    config: QueryableMemoryConfig,
    model: nn.Module,
    tokenizer: Any,
    *,
    places: Sequence[str | Path] = (),
    cache: Path | None = None,
) -> InstructionEncoder:
    """The encoder that an adapter's config names.

    Args:
        model: the adapted model, for its input embeddings.
        tokenizer: the base model's.
        places: folders that are the encoder, or that hold it under its name; looked at before the config's own path.
        cache: folder in which a sentence encoder keeps the embeddings it made; None keeps none.

    Raises:
        UserError: the encoder is not found, is not the one the adapter was trained with, or cannot be used.
    """
    encoder: InstructionEncoder
    if config.uses_base_encoder:
        encoder = BaseEmbeddingEncoder(model, tokenizer)
    else:
        folder, digest = find_encoder(config, places)
        config.prior_encoder_digest = digest
        encoder = SentenceEncoder(folder, digest, model.get_input_embeddings().weight.device, cache)
    if encoder.dim != config.prior_dim:
        raise UserError(
            f"the instruction encoder gives {encoder.dim} numbers, but the adapter was made for {config.prior_dim}",
            where=config.prior_encoder,
            fix="use the encoder the adapter was trained with",
        )
    return encoder


def find_encoder(config: QueryableMemoryConfig, places: Sequence[str | Path]) -> tuple[Path, str]:
    """The folder of an adapter's sentence encoder, and its digest.

    A saved adapter knows its encoder by name and content, not by place: a folder with that content is taken, wherever
    it is found.

    Raises:
        UserError: there is no encoder there, or only others.
    """
    name = config.encoder_name
    candidates = [path for place in places for path in (Path(place).expanduser(), Path(place).expanduser() / name)]
    candidates.append(Path(config.prior_encoder).expanduser())
    others = []
    for folder in candidates:
        if not is_encoder(folder):
            continue
        digest = folder_digest(folder)
        if config.prior_encoder_digest in (None, digest):
            return folder, digest
        others.append(folder)
    if others:
        raise UserError(
            "this instruction encoder is not the one that the adapter was trained with: its files differ",
            where=str(others[0]),
            fix=f"give the folder of the {name} that was used in training",
        )
    raise UserError(
        f"the adapter's instruction encoder, {name}, is not found",
        where=str(candidates[0]),
        fix=f"give its folder with adapter.prior_encoder=FOLDER, or copy it into the adapter's folder as {name}",
    )
