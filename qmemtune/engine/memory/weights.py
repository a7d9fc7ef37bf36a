"""Bytes of weights and optimizer state."""

from __future__ import annotations

from torch import nn

from qmemtune.config.model import QuantizationConfig
from qmemtune.config.training import OptimizerConfig
from qmemtune.models.head import output_head

BLOCK_4BIT = 64
"""Weights that share a scale in bitsandbytes' 4-bit types."""
BLOCK_SCALES = 256
"""Scales that share a scale of their own under double quantisation."""
SMALLEST_8BIT = 4096
"""Tensors with fewer elements keep their optimizer state in 32 bits under bitsandbytes' 8-bit optimizers."""


def quantised_layers(base: nn.Module, quantization: QuantizationConfig) -> list[nn.Linear]:
    """The layers that bitsandbytes replaces: every linear one but the output head, as transformers chooses them."""
    if quantization.kind == "none":
        return []
    head = output_head(base)
    return [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]


def base_bytes(base: nn.Module, quantised: list[nn.Linear], quantization: QuantizationConfig, itemsize: int) -> float:
    """The base's weights as they are stored while training.

    Args:
        base: without an adapter.
        quantised: from :func:`quantised_layers`.
        quantization: how these are stored.
        itemsize: bytes of a weight that is not quantised.
    """
    elements = sum(parameter.numel() for parameter in base.parameters())
    small = sum(layer.weight.numel() for layer in quantised)
    scales = 4 * sum(len(layer.weight) for layer in quantised) if kind_is_8bit(quantization) else 0
    return (elements - small) * itemsize + small * bytes_each(quantization) + scales


def kind_is_8bit(quantization: QuantizationConfig) -> bool:
    """Whether each row has a scale, in place of each block."""
    return quantization.kind == "int8"


def bytes_each(quantization: QuantizationConfig) -> float:
    """Bytes of a quantised weight with its share of the scales of blocks."""
    if kind_is_8bit(quantization):
        return 1.0
    scale = (1 + 4 / BLOCK_SCALES) if quantization.double_quant else 4
    return 0.5 + scale / BLOCK_4BIT


def optimizer_bytes(parameters: list[nn.Parameter], optimizer: OptimizerConfig) -> int:
    """State that an optimizer keeps for trained parameters."""
    return sum(_state_bytes(parameter, optimizer.name) for parameter in parameters)


def _state_bytes(parameter: nn.Parameter, name: str) -> int:
    elements = parameter.numel()
    if name == "sgd":
        return 0
    if name == "adafactor":
        if parameter.dim() < 2:
            return 4 * elements
        *_, height, width = parameter.shape
        return 4 * (elements // width + elements // height)
    if "8bit" in name and elements >= SMALLEST_8BIT:
        # Two moments of a byte, and their scales.
        return 2 * elements + 2 * 4 * (elements // BLOCK_SCALES)
    return 8 * elements
