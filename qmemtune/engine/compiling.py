"""``trainer.compile``: the decoder as torch.compile makes it, for training steps only.

The decoder, not the whole model: the loss takes gradients by itself, and evaluations and generation, whose shapes are
others, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qmemtune.config.schema import Config
from qmemtune.errors import UserError

KEY = "trainer.compile"


def has_fused_layers(config: Config) -> bool:
    """Whether training runs in fused layers: a compiler fuses by itself what is written out plainly."""
    return config.trainer.fused_layers and not config.trainer.compile


def has_training_attention(config: Config) -> bool:
    """Whether training has an attention of its own: rows without padding, and short rows on a CPU."""
    return config.model.attn_implementation is None and not config.trainer.compile


def check_compiler(device: torch.device) -> None:
    """Whether torch.compile has what it needs on this device.

    Raises:
        UserError: it has not.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "torch.compile needs Triton on this GPU", where=KEY, fix="install triton, or set it to false"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "torch.compile needs a C++ compiler on a CPU",
            where=KEY,
            fix="install g++ (or name one in CXX), or set it to false",
        ) from None


def compiled(decoder: nn.Module) -> Callable[..., Any]:
    """The decoder for calls with gradients; it has the same weights and hooks.

    Batches have many lengths: after the second one, a graph is made that holds for all of them.
    """
    made: Callable[..., Any] = torch.compile(decoder)
    return made
