"""What a base model's config alone tells: its shape, without any weight."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qmemtune.config.model import ModelConfig
from qmemtune.models.failures import explained
from qmemtune.models.sources import Source


def read_config(source: Source, model: ModelConfig) -> PretrainedConfig:
    """The config of a base model, as its files have it.

    Raises:
        UserError: it cannot be read.
    """
    with explained(source):
        found: PretrainedConfig = AutoConfig.from_pretrained(
            source.location, revision=source.revision or "main", trust_remote_code=model.trust_remote_code
        )
    return found


def empty_model(source: Source, model: ModelConfig, found: PretrainedConfig, **options: str) -> PreTrainedModel:
    """The model on the meta device: every tensor has a shape and no memory.

    Args:
        source: where the config comes from, for messages.
        model: the options it is loaded with.
        found: the config.
        options: for transformers' ``from_config``.

    Raises:
        UserError: it is no causal language model.
    """
    with explained(source), torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            found, trust_remote_code=model.trust_remote_code, **options
        )
    return made
