"""Keeps bitsandbytes' 4-bit weights in the form that has gradients."""

from __future__ import annotations

from torch import nn

FLAG = "support_avx512bf16_for_cpu"


def keep_unpacked(model: nn.Module) -> None:
    """Stop a base's 4-bit layers, adapted or not, from packing their weights.

    bitsandbytes packs a 4-bit weight in place at the first no-grad forward in eval mode on processors with
    AVX512-BF16, and the packed product has no gradient: training after an evaluation would be silently wrong in every
    layer below.

    Raises:
        ValueError: a weight is packed already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, FLAG):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weight of {name} was packed for inference, in which it has no gradient: "
                "load the base model again and adapt it before its first forward pass"
            )
        setattr(module, FLAG, False)
