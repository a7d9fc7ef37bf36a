"""Base weights in 4 or 8 bits, through bitsandbytes on GPU and CPU."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from qmemtune.config.model import QuantizationConfig
from qmemtune.errors import UserError

FLAG = "support_avx512bf16_for_cpu"
"""Attribute of a 4-bit layer that lets it repack its weights for inference."""


def bitsandbytes_config(quantization: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What ``from_pretrained`` needs to quantise while loading; ``None`` for an unquantised base.

    The output head and weights tied to the embeddings stay unquantised: that is transformers' own choice when no
    list of skipped modules is given, and it knows each architecture's name for them.

    Args:
        dtype: data type of the products with the dequantised 4-bit weights.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if quantization.kind == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"{quantization.kind} needs bitsandbytes, which is not installed",
            where="quantization.kind",
            fix="run `pip install bitsandbytes`, or use quantization=none",
        )
    if quantization.kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_not_about_inputs)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _not_about_inputs(record: logging.LogRecord) -> bool:
    # bitsandbytes says that it casts inputs to float16 in every layer of every forward: that is what int8 does.
    return "inputs will be cast" not in record.getMessage()


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer itself holds its weight in 4 or 8 bits."""
    # Its own parameter: adapters have a property of this name that looks through to their base layer.
    return type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def dequantised_weight(layer: nn.Module) -> Tensor:
    """The weight that a quantised layer multiplies with, float32, (out_features, in_features).

    The layer is left as it is. (PEFT's and transformers' functions for this move an 8-bit weight, which then loses its
    scales and fails in the next forward.)
    """
    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return unpacked.float()
    # The first forward moves values and scales from the weight to the layer's state.
    state: Any = layer.state
    values = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB
    return values.float() * (scales.float() / 127.0).view(-1, 1)


def keep_4bit_trainable(model: nn.Module) -> int:
    """Stop 4-bit layers from repacking their weights on processors with AVX512-BF16; returns how many there are.

    There, the first forward without gradients in eval mode rewrites each weight in place for a product that has no
    gradient, and ``train()`` does not undo it: training after an evaluation is silently wrong, and so is a merge.
    Call it before the first forward.
    """
    layers = [module for module in model.modules() if hasattr(module, FLAG)]
    for layer in layers:
        setattr(layer, FLAG, False)
    return len(layers)
