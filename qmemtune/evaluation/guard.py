"""An evaluation leaves no trace: a run with evaluations ends bit for bit as one without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from qmemtune.models.bitsandbytes import keep_4bit_trainable

REMEMBERED = ("config", "generation_config")
"""Attributes of modules that generation may replace."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and on leaving restore all that an evaluation can change.

    Restored: the mode of every module (a frozen part may have been in eval mode while the rest trained), every
    parameter's ``requires_grad`` (switching an adapter off and on resets it), ``use_cache`` of every config, the
    modules' generation configs, and the random states of Python, NumPy and torch. 4-bit weights on the CPU are
    kept from being repacked (see :func:`~qmemtune.models.bitsandbytes.keep_4bit_trainable`).
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = [
        (module, name, module.__dict__[name]) for module in modules for name in REMEMBERED if name in module.__dict__
    ]
    caching = [(config, config.use_cache) for config in configs_of(modules)]
    random_states = get_random_states()
    keep_4bit_trainable(model)
    model.eval()
    try:
        yield
    finally:
        set_random_states(random_states)
        for module, name, value in attributes:
            module.__dict__[name] = value
        for config, use_cache in caching:
            config.use_cache = use_cache
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def configs_of(modules: list[nn.Module]) -> list[Any]:
    """The distinct model configs of these modules that have ``use_cache``."""
    found: dict[int, Any] = {}
    for module in modules:
        config = module.__dict__.get("config")
        if config is not None and not isinstance(config, dict) and hasattr(config, "use_cache"):
            found[id(config)] = config
    return list(found.values())


def get_random_states() -> dict[str, Any]:
    """The global random states of Python, NumPy, torch and, where they are in use, the GPUs."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set what :func:`get_random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
