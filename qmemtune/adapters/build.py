"""From adapter options to an adapted model and its optimizer groups."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from qmemtune.adapters.methods import check_layers, check_loads, is_quantised, method_config, refused
from qmemtune.adapters.queryable import QueryableMemoryConfig, memory_of
from qmemtune.adapters.queryable.blocks import layer_group
from qmemtune.adapters.queryable.config import BASE_ENCODER
from qmemtune.adapters.queryable.layer import supported
from qmemtune.adapters.queryable.memory import MEMORY_NAME
from qmemtune.adapters.queryable.sentence import embedding_dim, folder_digest
from qmemtune.config.adapters import (
    INITS_FROM_WEIGHTS,
    AdapterConfig,
    LoraConfig,
    MethodConfig,
    QueryableConfig,
    uses_prior,
)
from qmemtune.errors import Finding, UserError
from qmemtune.models.head import decoder_of, output_head

ALL_LINEAR = "all-linear"
PLAIN_HEAD = "head"
"""Name of the output layer of a plain stack of linear layers."""


def apply_adapter(model: nn.Module, config: AdapterConfig, *, seed: int) -> PeftModel:
    """Adapt a base model; the base's weights are frozen.

    Args:
        model: a causal language model, quantised or not, or a plain stack of linear layers with an output ``head``.
        config: the adapter's options.
        seed: seed of the adapter's initial weights, which depend on nothing else.

    Raises:
        UserError: targets that match nothing, or an adapter this base cannot have.
    """
    check_targets(model, config)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, peft_config(config, model))
        except (ValueError, NotImplementedError) as error:
            raise UserError(str(error), where="adapter") from error
        except (RuntimeError, TypeError) as error:
            if not isinstance(config, MethodConfig):
                raise
            raise refused(config, error) from error
    assert isinstance(adapted, PeftModel)
    if isinstance(config, MethodConfig):
        check_loads(adapted, config)
        check_layers(adapted, config)
    return adapted


def peft_config(config: AdapterConfig, model: nn.Module) -> PeftConfig:
    """PEFT's config for our adapter options on this model."""
    text_layers = text_layers_of(model)
    places: dict[str, Any] = {
        "target_modules": target_modules(config, model, text_layers),
        "exclude_modules": list(config.exclude_modules) or None,
        # PEFT takes the n-th layer of every tower for the n-th layer; names of text layers are chosen by layer already.
        "layers_to_transform": config.layers_to_transform if text_layers is None else None,
        "task_type": "CAUSAL_LM" if isinstance(model, PreTrainedModel) else None,
    }
    if isinstance(config, MethodConfig):
        return method_config(config, places)
    common: dict[str, Any] = {"r": config.r, **places}
    alpha = 2 * config.r if config.alpha is None else config.alpha
    if isinstance(config, LoraConfig):
        return PeftLoraConfig(
            lora_alpha=alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            init_lora_weights=True if config.init == "default" else config.init,
            **common,
        )
    assert isinstance(config, QueryableConfig)
    prior_dim = prior_digest = None
    if uses_prior(config) and config.prior_encoder != BASE_ENCODER:
        encoder = Path(config.prior_encoder).expanduser()
        prior_dim, prior_digest = embedding_dim(encoder), folder_digest(encoder)
    return QueryableMemoryConfig(
        alpha=alpha,
        dropout=config.dropout,
        num_atoms=config.num_atoms,
        key_dim=config.key_dim,
        block_size=config.block_size,
        top_k=config.top_k,
        temperature=config.temperature,
        router_norm=config.router_norm,
        center_cores=config.center_cores,
        center_queries=config.center_queries,
        depth_summary=config.depth_summary,
        granularity=config.granularity,
        shared_atoms=config.shared_atoms,
        generated_core=config.generated_core,
        init_core_std=config.init_core_std,
        instruction_prior=config.instruction_prior,
        prior_encoder=config.prior_encoder,
        prior_dim=prior_dim,
        prior_temperature=config.prior_temperature,
        prior_encoder_digest=prior_digest,
        prior_kl=config.prior_kl,
        instruction_prior_final=config.instruction_prior_final,
        prior_temperature_final=config.prior_temperature_final,
        prior_kl_final=config.prior_kl_final,
        **common,
    )


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that an adapter may be in, with their names."""
    return [(name, module) for name, module in model.named_modules() if supported(module)]


def text_layers_of(model: nn.Module) -> dict[str, str] | None:
    """Linear layers of a multimodal model that text passes through; None of a model in which text passes through all.

    The towers of images and sounds, and what joins them to the text, get no gradient from text.

    Returns:
        name of each linear layer of the text decoder, and of the output head -> its name within the decoder ("" for
        the head).
    """
    if not isinstance(model, PreTrainedModel) or text_config_of(model) is model.config:
        return None
    decoder, head = decoder_of(model), output_head(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    prefix = f"{prefix}." if prefix else ""
    linear = linear_layers(model)
    reached = {
        name: "" if module is head else name.removeprefix(prefix)
        for name, module in linear
        if module is head or name.startswith(prefix)
    }
    return None if len(reached) == len(linear) else reached


def text_config_of(model: nn.Module) -> Any:
    """The config that describes the decoder's layers; None for a model without a config."""
    config = getattr(model, "config", None)
    # An encoder-decoder may have two text configs, between which transformers cannot choose.
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return config
    return model.config.get_text_config()


def target_modules(config: AdapterConfig, model: nn.Module, text_layers: dict[str, str] | None) -> str | list[str]:
    """Names for PEFT, which knows what all-linear means in a transformers model of text only.

    Args:
        text_layers: what :func:`text_layers_of` says of the model.
    """
    if text_layers is not None:
        return [n for n, within in text_layers.items() if is_target(n, within, config)]
    if ALL_LINEAR not in config.target_modules:
        return list(config.target_modules)
    by_name = config.layers_to_transform is not None or (isinstance(config, MethodConfig) and config.method == "ia3")
    if isinstance(model, PreTrainedModel) and by_name:
        # PEFT chooses among layers, and IA3 among the ways to adapt one, by the names of targets only.
        head = output_head(model)
        return sorted({n.rpartition(".")[2] for n, m in linear_layers(model) if m is not head})
    if isinstance(model, PreTrainedModel):
        return ALL_LINEAR
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != PLAIN_HEAD]


def is_target(name: str, within: str, config: AdapterConfig) -> bool:
    """Whether a linear layer of a multimodal model is one to adapt.

    Args:
        name: in the model.
        within: in the decoder; "" for the output head.
    """
    layer = layer_group(within).rpartition(".")[2]
    if config.layers_to_transform is not None and not (layer.isdigit() and int(layer) in config.layers_to_transform):
        return False
    if ALL_LINEAR in config.target_modules:
        return bool(within)
    return any(matches(name, target) for target in config.target_modules)


def matches(name: str, target: str) -> bool:
    """Whether a layer has a target's name, as PEFT reads it: in full, or the end of it."""
    return name == target or name.endswith(f".{target}")


def check_targets(model: nn.Module, config: AdapterConfig, *, quantised: bool | None = None) -> None:
    """Find target names and layer indices that match nothing.

    Args:
        model: the base, with or without weights.
        config: the adapter's options.
        quantised: whether the base is or will be quantised; what the model itself says if not given.

    Raises:
        UserError: with every such name and the nearest one that exists.
    """
    linear = [name for name, _ in linear_layers(model)]
    text_layers = text_layers_of(model)
    reached = linear if text_layers is None else list(text_layers)
    findings = []
    # A tower's layer may be excluded, which changes nothing, but not adapted.
    for key, names in (("target_modules", reached), ("exclude_modules", linear)):
        whose = "the model" if names is linear else "the model's text decoder"
        endings = sorted({name.rpartition(".")[2] for name in names})
        for target in getattr(config, key):
            if target == ALL_LINEAR or any(matches(name, target) for name in names):
                continue
            near = difflib.get_close_matches(target, endings, n=1)
            hint = f"did you mean {near[0]}?" if near else f"this model has {', '.join(endings)}"
            findings.append(Finding(f"{target!r} matches no linear layer of {whose}", f"adapter.{key}", hint))
    layers = getattr(text_config_of(model), "num_hidden_layers", None)
    for index in config.layers_to_transform or []:
        if layers is not None and not 0 <= index < layers:
            problem = f"there is no decoder layer {index}: the model has {layers}"
            findings.append(Finding(problem, "adapter.layers_to_transform", f"use indices from 0 to {layers - 1}"))
    if quantised is None:
        quantised = is_quantised(model)
    if isinstance(config, LoraConfig) and quantised and config.init in INITS_FROM_WEIGHTS:
        problem = f"init {config.init} changes the base's weights, which a quantised base does not allow"
        findings.append(Finding(problem, "adapter.init", "use adapter.init=default or quantization=none"))
    if findings:
        raise UserError.many(findings)


def parameter_groups(
    model: nn.Module, config: AdapterConfig, *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: factors, router, cores.

    The cores' gradients carry a factor B, which starts at zero, so memory and router get a learning rate of their own.
    Decay on the cores pulls toward LoRA; it is decoupled and, as in AdamW, multiplied by the group's learning rate.
    """
    factors: list[Tensor] = []
    router: list[Tensor] = []
    cores: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"{MEMORY_NAME}.queryable_core." in name:
            cores.append(parameter)
        elif f"{MEMORY_NAME}." in name:
            router.append(parameter)
        else:
            factors.append(parameter)
    groups: list[dict[str, Any]] = [{"params": factors, "lr": learning_rate, "weight_decay": weight_decay}]
    if isinstance(config, QueryableConfig):
        rate = learning_rate * config.memory_learning_rate_multiplier
        groups.append({"params": router, "lr": rate, "weight_decay": 0.0})
        groups.append({"params": cores, "lr": rate, "weight_decay": config.core_weight_decay})
    return groups


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """``beta * KL(route without prior || prior)`` of the last forward pass, a scalar; None where there is none."""
    memory = memory_of(model)
    if memory is None or not memory.divergence:
        return None
    terms = [memory.configs[name].current_prior_kl * value for name, value in memory.divergence.items()]
    return torch.stack(terms).sum()


def kind_of(model: PeftModel) -> str:
    """lora, queryable, or the PEFT method's name in small letters."""
    active = model.peft_config[model.active_adapters[0]]
    return active.peft_type.value.lower() if memory_of(model) is None else "queryable"


def describe(model: PeftModel) -> dict[str, Any]:
    """Facts about the adapter: kind, adapted layers, trainable parameters and, with a memory, its parts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = memory_of(model)
    facts: dict[str, Any] = {
        "kind": kind_of(model),
        "adapted_layers": len(model.base_model.targeted_module_names),
        "trainable_parameters": trainable,
    }
    if memory is not None:
        name = model.active_adapters[0]
        facts["memory_parameters"] = sum(p.numel() for p in memory.parameters())
        facts["num_atoms"] = memory.configs[name].num_atoms
        facts["num_blocks"] = memory.num_blocks(name)
    return facts
