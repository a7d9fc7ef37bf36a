"""Fast 4-bit generation on the CPU: each weight is dequantised once, not once a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
import torch.nn.functional as F
from torch import nn

MEMORY_SHARE = 0.25
"""Of the memory now free, so much may be used."""


@contextmanager
def dequantized_on_cpu(model: nn.Module) -> Iterator[None]:
    """While open, 4-bit layers on the CPU compute with a dequantised copy of their weight.

    The numbers are those of the layer itself, bit for bit: without a packed kernel bitsandbytes, too, dequantises
    to the compute dtype and multiplies, in each forward pass. A decoded token reads every weight once, so that
    dequantising takes most of its time. Layers on a GPU have fused kernels and are left alone, and so is a model
    whose copy would take more than a quarter of the free memory. Weights must not change while it is open.
    """
    layers: list[Any] = [module for module in model.modules() if is_swappable(module)]
    needed = sum(layer.in_features * layer.out_features * 4 for layer in layers)
    if needed > MEMORY_SHARE * psutil.virtual_memory().available:
        layers = []
    for layer in layers:
        layer.forward = cached_forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def is_swappable(module: nn.Module) -> bool:
    """A quantised 4-bit layer on the CPU, in the standard layout, whose forward nobody else has replaced."""
    if not isinstance(module, bnb.nn.Linear4bit) or "forward" in module.__dict__:
        return False
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if weight.device.type != "cpu" or state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    shape: tuple[int, ...] = tuple(state.shape)
    return shape == (module.out_features, module.in_features)


def cached_forward(layer: bnb.nn.Linear4bit) -> Callable[[torch.Tensor], torch.Tensor]:
    """``Linear4bit.forward``, with the dequantised weight kept per dtype."""
    weights: dict[torch.dtype, torch.Tensor] = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(layer, x)
        if dtype not in weights:
            packed = layer.weight
            weights[dtype] = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), weights[dtype], bias).to(x.dtype)

    return forward


def compute_dtype(layer: bnb.nn.Linear4bit, x: torch.Tensor) -> torch.dtype:
    """What the layer would compute in; unlike the layer's own forward, this does not fix it for later calls."""
    if not layer.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype
    return layer.compute_dtype or x.dtype
