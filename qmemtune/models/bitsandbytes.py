"""Base weights in 4 or 8 bits, through bitsandbytes on GPU and CPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from qmemtune.config.schema import QuantizationConfig
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
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


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
