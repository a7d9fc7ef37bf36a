"""A run's model without its weights: every tensor has a shape and no memory."""

from __future__ import annotations

from dataclasses import replace

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from qmemtune.adapters import apply_adapter
from qmemtune.config.adapters import AdapterConfig, LoraConfig
from qmemtune.config.model import ModelConfig
from qmemtune.config.regression import is_regression
from qmemtune.config.schema import Config
from qmemtune.models.configs import empty_model, read_config
from qmemtune.models.mlp import Mlp
from qmemtune.models.sources import resolve


def base_skeleton(config: Config, *, weights: bool = True) -> nn.Module:
    """The frozen base of a run; of a language model only its config is read.

    Args:
        config: the run.
        weights: require that a local folder holds the weights too.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    if is_regression(config):
        shape, mlp = config.data.regression, config.model.mlp
        return Mlp(shape.inputs, shape.outputs, width=mlp.width, depth=mlp.depth).requires_grad_(False)
    return language_skeleton(config.model, weights=weights)


def language_skeleton(config: ModelConfig, *, weights: bool = True) -> PreTrainedModel:
    """See :func:`base_skeleton`."""
    source = resolve(config.path, config.revision, weights=weights)
    options = {}
    if config.attn_implementation in ("eager", "sdpa"):
        # Other kernels may not be installed here; like sdpa they hold no weights of the attention.
        options["attn_implementation"] = config.attn_implementation
    return empty_model(source, config, read_config(source, config), **options).requires_grad_(False)


def adapted_skeleton(config: Config, base: nn.Module) -> PeftModel:
    """The base with the run's adapter.

    Raises:
        UserError: targets that match nothing, or an adapter this base cannot have.
    """
    model = apply_adapter(base, without_weights(config.adapter), seed=config.seed)
    if isinstance(config.adapter, LoraConfig) and config.adapter.init != "default":
        # So that the adapter's config is the run's, to be compared with a checkpoint's.
        model.peft_config[model.active_adapters[0]].init_lora_weights = config.adapter.init
    return model


def without_weights(adapter: AdapterConfig) -> AdapterConfig:
    """The same adapter with an initialisation that does not look at the base's weights."""
    return replace(adapter, init="default") if isinstance(adapter, LoraConfig) else adapter
