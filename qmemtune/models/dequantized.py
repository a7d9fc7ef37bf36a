"""Fast 4-bit layers on the CPU: each weight is dequantised once, not in every forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
import torch.nn.functional as F
from torch import nn

MEMORY_SHARE = 0.25
"""Of the memory now free, so much may be used."""
REFUSED = "_qmemtune_no_dequantized_copy"
"""Attribute of a layer that is to have no copy."""


@contextmanager
def dequantized_on_cpu(model: nn.Module, *, processes: int = 1) -> Iterator[int]:
    """While open, frozen 4-bit layers on the CPU compute with a dequantised copy of their weight.

    The numbers are those of the layer itself, bit for bit, gradients too: without a packed kernel bitsandbytes also
    dequantises to the compute dtype and multiplies, once in each forward pass and once in each backward pass. That
    takes most of the time of a decoded token or of a small training batch. Layers on a GPU have fused kernels and are
    left alone, and so is a model whose copies would take more than a quarter of the free memory. A copy is made in
    the layer's first forward pass. Weights must not change while it is open. Blocks may be nested: the inner one finds
    nothing left to do.

    Args:
        processes: how many processes on this machine do the same.

    Yields:
        The bytes that the copies take in this process; 0 without any.
    """
    layers: list[Any] = [module for module in model.modules() if is_swappable(module)]
    needed = sum(layer.in_features * layer.out_features * copy_dtype(layer).itemsize for layer in layers)
    if not copies_fit(needed, processes):
        layers, needed = [], 0
    for layer in layers:
        layer.forward = DequantizedProduct(layer)
    try:
        yield needed
    finally:
        for layer in layers:
            del layer.forward


def copies_fit(needed: float, processes: int = 1) -> bool:
    """Whether copies of so many bytes a process may be made, by the memory that is free now."""
    return needed * processes <= MEMORY_SHARE * psutil.virtual_memory().available


def refuse_copies(model: nn.Module) -> None:
    """Keep :func:`dequantized_on_cpu` away from this model's layers for good."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.__dict__[REFUSED] = True


def is_swappable(module: nn.Module) -> bool:
    """A frozen 4-bit layer on the CPU, in the standard layout, whose forward nobody else has replaced."""
    untouched = REFUSED not in module.__dict__ and "forward" not in module.__dict__
    return untouched and on_cpu(module) and is_plain_4bit(module)


def on_cpu(module: nn.Module) -> bool:
    """Whether a layer's weight is on the CPU."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.device.type == "cpu"


def is_plain_4bit(module: nn.Module) -> bool:
    """A quantised 4-bit layer whose weight is in the standard layout, so that it can be dequantised."""
    if not isinstance(module, bnb.nn.Linear4bit):
        return False
    state = getattr(module.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    shape: tuple[int, ...] = tuple(state.shape)
    return shape == (module.out_features, module.in_features)


def dequantized_weight(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight of a layer for which :func:`is_plain_4bit` holds, (out_features, in_features), made anew; None where
    the layer multiplies inputs of this type in another one."""
    if compute_dtype(layer, dtype) != dtype:
        return None
    # Not as an inference tensor, whatever the caller's mode: a backward pass may need it later.
    with torch.inference_mode(False), torch.no_grad():
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


class DequantizedProduct:
    """``Linear4bit.forward``, with the dequantised weight kept per dtype.

    Args:
        layer: a layer for which :func:`is_swappable` holds.
    """

    def __init__(self, layer: bnb.nn.Linear4bit) -> None:
        self.layer = layer
        self._weights: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(self.layer, x.dtype)
        bias = None if self.layer.bias is None else self.layer.bias.to(dtype)
        weight = self.weight_in(dtype)
        assert weight is not None
        return F.linear(x.to(dtype), weight, bias).to(x.dtype)

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """As :func:`dequantized_weight`, made on first use."""
        if dtype not in self._weights:
            weight = dequantized_weight(self.layer, dtype)
            if weight is None:
                return None
            self._weights[dtype] = weight
        return self._weights[dtype]


def compute_dtype(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> torch.dtype:
    """What the layer computes in for inputs of a type; unlike its own forward, this does not fix it for later calls."""
    if not layer.compute_type_is_set and dtype in (torch.float32, torch.bfloat16):
        return dtype
    return layer.compute_dtype or dtype


def copy_dtype(layer: bnb.nn.Linear4bit) -> torch.dtype:
    """The compute dtype as far as it is known before the first input, else float32."""
    known: torch.dtype | None = layer.compute_dtype if layer.compute_type_is_set else None
    return known or torch.float32
