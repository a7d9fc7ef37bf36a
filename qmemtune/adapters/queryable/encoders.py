"""Encoders of instruction texts: the base model's own input embeddings, or a sentence-transformers folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.errors import UserError

MAX_SENTENCE_TOKENS = 256


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


class SentenceEncoder:
    """Mean-pooled sentence embeddings of a sentence-transformers folder, loaded through transformers."""

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = AutoModel.from_pretrained(folder).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise _not_an_encoder(folder, error) from error
        self.dim = int(self.model.config.hidden_size)
        self.device = device

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See :class:`InstructionEncoder`."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_SENTENCE_TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def make_encoder(config: QueryableMemoryConfig, model: nn.Module, tokenizer: Any) -> InstructionEncoder:
    """The encoder that an adapter's config names.

    Raises:
        UserError: the folder holds no encoder, or one of another width than the adapter was trained with.
    """
    encoder: InstructionEncoder
    if config.prior_encoder == "base":
        encoder = BaseEmbeddingEncoder(model, tokenizer)
    else:
        encoder = SentenceEncoder(config.prior_encoder, model.get_input_embeddings().weight.device)
    if encoder.dim != config.prior_dim:
        raise UserError(
            f"the instruction encoder gives {encoder.dim} numbers, but the adapter was made for {config.prior_dim}",
            where=config.prior_encoder,
            fix="use the encoder the adapter was trained with",
        )
    return encoder


def sentence_embedding_dim(folder: str) -> int:
    """Width of a sentence-transformers folder's embeddings.

    Raises:
        UserError: the folder holds no encoder.
    """
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(folder).hidden_size)
    except (OSError, ValueError, AttributeError) as error:
        raise _not_an_encoder(folder, error) from error


def _not_an_encoder(folder: str, error: Exception) -> UserError:
    return UserError(
        f"no sentence encoder can be loaded: {str(error).splitlines()[0]}",
        where=f"adapter.prior_encoder={folder}",
        fix="give a sentence-transformers folder (config.json, tokenizer and weights), or 'base'",
    )
