"""Any other PEFT method as an adapter: its name and options checked, its layers tried."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qmemtune.adapters.queryable.registration import QUERYABLE
from qmemtune.config.adapters import AdapterConfig, MethodConfig
from qmemtune.errors import Finding, UserError, first_line

PRESETS: dict[str, tuple[PeftType, dict[str, Any]]] = {"dora": (PeftType.LORA, {"use_dora": True})}
"""Methods that PEFT has as an option of another one."""

TO_THE_PROMPT = "it adds to the prompt and changes no layer"
FROM_WEIGHTS = "it starts from the base's weights, which are not there when a run is checked"
REASONS = {
    "ADALORA": "it changes its ranks during training, which needs a training loop of its own",
    "XLORA": "it mixes adapters that are trained already",
    "POLY": "it needs a task number with every row",
    "CARTRIDGE": TO_THE_PROMPT,
    "CPT": TO_THE_PROMPT,
    "ADAPTION_PROMPT": TO_THE_PROMPT,
    "TRAINABLE_TOKENS": "it trains rows of the embeddings and changes no linear layer",
    "SHADOW": "it wraps the whole model and changes no layer",
    "FROD": FROM_WEIGHTS,
    "ADAMSS": FROM_WEIGHTS,
    "SHIRA": FROM_WEIGHTS,
}
UNSUITED = {PeftType[name]: reason for name, reason in REASONS.items() if name in PeftType.__members__}
"""Methods that are not offered, as far as this version of PEFT has them."""
OURS = {QUERYABLE: "queryable", PeftType.LORA: "lora"}
"""Methods that have adapter options of their own."""
PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "task_type"}
"""Fields of a PEFT config that other keys of ours set."""
METHOD_KEY, OPTIONS_KEY = "adapter.method", "adapter.options"


def check_method(config: AdapterConfig) -> list[str]:
    """Find mistakes in a PEFT method's name and options before anything is loaded.

    Returns:
        What is set and has no effect, one line each.

    Raises:
        UserError: with all of them.
    """
    if isinstance(config, MethodConfig):
        method_config(config, {"target_modules": ["q_proj"], "task_type": None})
    return without_effect(config)


def method_config(config: MethodConfig, places: Mapping[str, Any]) -> PeftConfig:
    """PEFT's config of the method.

    Args:
        config: name and options.
        places: where it goes: target_modules and the like, as far as they are set.

    Raises:
        UserError: there is no such method or option, or a value does not fit.
    """
    kind, preset = method_kind(config.method)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    findings, values = [], dict(preset)
    hints = get_type_hints(cls)
    for name, text in config.options.items():
        if name in PLACES:
            findings.append(Finding(f"{name} is set in another place", f"{OPTIONS_KEY}.{name}", f"set adapter.{name}"))
        elif name not in known:
            near = difflib.get_close_matches(name, sorted(known - PLACES), n=1)
            fix = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known - PLACES - BOOKKEEPING))}"
            findings.append(Finding(f"{config.method} has no option {name!r}", f"{OPTIONS_KEY}.{name}", fix))
        else:
            try:
                values[name] = as_typed(text, hints[name])
            except ValueError as error:
                findings.append(Finding(str(error), f"{OPTIONS_KEY}.{name}"))
    for name, value in common_options(config, known).items():
        values.setdefault(name, value)
    given = {name: value for name, value in places.items() if value is not None}
    for name in sorted(set(given) - known):
        findings.append(Finding(f"{config.method} cannot be limited by {name}", f"adapter.{name}", "leave it out"))
    if findings:
        raise UserError.many(findings)
    try:
        return cls(**{**given, **values})
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split()), where=OPTIONS_KEY) from error


BOOKKEEPING = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}


ALPHA = ("lora_alpha", "alpha")
DROPOUT = ("lora_dropout", "vera_dropout", "randlora_dropout", "vblora_dropout", "dropout", "module_dropout")
"""Names that PEFT's methods have for the same thing."""


def common_options(config: MethodConfig, known: set[str]) -> dict[str, Any]:
    """r, alpha and dropout as the method names them."""
    found: dict[str, Any] = {"r": config.r} if "r" in known else {}
    if {"r", "oft_block_size"} <= known:
        # PEFT's OFT takes one of the two, and has a default for the other.
        found |= {"r": 0} if "oft_block_size" in config.options else {"oft_block_size": 0}
    alpha = 2.0 * config.r if config.method in PRESETS and config.alpha is None else config.alpha
    for value, names in ((alpha, ALPHA), (config.dropout or None, DROPOUT)):
        name = next((name for name in names if name in known), None)
        if value is not None and name is not None:
            found[name] = value
    return found


def without_effect(config: AdapterConfig) -> list[str]:
    """Common options that are set and that a PEFT method does not have, one line each."""
    if not isinstance(config, MethodConfig):
        return []
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method_kind(config.method)[0]])}
    lacking = {"r": "r" not in known}
    lacking["alpha"] = config.alpha is not None and not known & set(ALPHA)
    lacking["dropout"] = bool(config.dropout) and not known & set(DROPOUT)
    return [f"adapter.{name} has no effect: {config.method} has none" for name, lacks in lacking.items() if lacks]


def method_kind(name: str) -> tuple[PeftType, dict[str, Any]]:
    """The method's PeftType, and options that its name stands for.

    Raises:
        UserError: there is none, or it cannot be used like this.
    """
    if name in PRESETS:
        return PRESETS[name]
    usable = {kind.value.lower(): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if why_not(kind) is None}
    if name in usable:
        return usable[name], {}
    named = next((kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value.lower() == name), None)
    if named in OURS:
        raise UserError(f"{name} has options of its own", where=METHOD_KEY, fix=f"use adapter={OURS[named]}")
    choices = sorted([*usable, *PRESETS])
    if named is not None:
        raise UserError(f"{name} is no adapter of layers: {why_not(named)}", where=METHOD_KEY, fix=", ".join(choices))
    near = difflib.get_close_matches(name, choices, n=1)
    raise UserError(
        f"PEFT has no method {name!r}",
        where=METHOD_KEY,
        fix=f"did you mean {near[0]}?" if near else f"one of {', '.join(choices)}",
    )


def why_not(kind: PeftType) -> str | None:
    """Why a method is not offered; None if it is."""
    if kind in OURS:
        return "it has options of its own"
    if kind in UNSUITED:
        return UNSUITED[kind]
    if "target_modules" not in {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}:
        return TO_THE_PROMPT
    return None


def as_typed(text: str, hint: Any) -> Any:
    """The value that an option's text stands for.

    Raises:
        ValueError: it does not fit the option's type.
    """
    value = yaml.safe_load(text)
    if isinstance(value, str) and fits(0.0, hint):
        with suppress(ValueError):
            value = float(value)  # 1e-3 is text to YAML
    if not fits(value, hint):
        raise ValueError(f"{text!r} is no {words(hint)}")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is one of a type's; types that are not plain accept anything."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in (NoneType, None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str) or origin in (list, dict):
        return isinstance(value, origin or hint)
    return True


def words(hint: Any) -> str:
    """A type as PEFT writes it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def is_quantised(model: nn.Module) -> bool:
    """Whether bitsandbytes holds the model's weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def check_layers(model: PeftModel, config: MethodConfig) -> None:
    """Run each adapted layer of a quantised model once, forward and back.

    PEFT takes a quantised layer for an ordinary linear one in methods that were not made for it. What adds to the
    layer's output works all the same; what reads the packed weight fails here and not in the first step.

    Raises:
        UserError: a layer fails; with the reason.
    """
    base = model.get_base_model()
    if not is_quantised(base):
        return
    # As in training: 16-bit bases compute under autocast, over adapters in float32.
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    tried = set()
    for name, layer in model.named_modules():
        inputs = getattr(getattr(layer, "base_layer", None), "in_features", None)
        if not isinstance(layer, BaseTunerLayer) or inputs is None:
            continue
        shape = (inputs, layer.base_layer.out_features)
        if shape in tried:
            continue
        tried.add(shape)
        try:
            device = next(layer.parameters()).device
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = layer(torch.ones(1, inputs, device=device, dtype=dtype))
            out.sum().backward()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise refused(config, error, name) from error
        finally:
            layer.zero_grad(set_to_none=True)


def check_loads(model: PeftModel, config: MethodConfig) -> None:
    """Make sure that PEFT takes its own config back, as it is saved.

    Raises:
        UserError: it does not.
    """
    own = model.peft_config[model.active_adapter]
    try:
        PeftConfig.from_peft_type(**own.to_dict())
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{config.method} could not be loaded again with these targets ({first_line(error)})",
            where="adapter.target_modules",
            fix="name layers by the ends of their names, such as [q_proj, v_proj]",
        ) from error


def refused(config: MethodConfig, error: Exception, layer: str | None = None) -> UserError:
    """The error for a method that failed on this base."""
    place = f"{layer}: " if layer else ""
    return UserError(
        f"{config.method} cannot adapt this base ({place}{first_line(error)})",
        where=METHOD_KEY,
        fix="use quantization=none if the base is quantised, or another method",
    )
