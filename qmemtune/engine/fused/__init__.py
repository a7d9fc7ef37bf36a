"""Fewer passes over large tensors in a training step.

Where matrix products are fast (a GPU, AMX, AVX-512 with bfloat16), most of a fine-tuning step is spent on what lies
between them: casts, scaling and adding low-rank updates, normalisation, the sums of gradients that meet at one input.
Each part here does the same arithmetic in fewer passes and keeps less for the backward pass. All of them are switched
on for the duration of training by :func:`fused_layers`, layer by layer, where a layer is what the part is made for;
every other layer runs as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qmemtune.engine.fused.low_rank import low_rank_forward
from qmemtune.engine.fused.mlp import gated_forward
from qmemtune.engine.fused.norm import norm_forward
from qmemtune.engine.fused.projections import Projections, fused_projections
from qmemtune.engine.fused.rotary import fused_rotary


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """While open, layers on a CPU or an NVIDIA GPU that have a fused form run in it when gradients are wanted.

    Layers whose ``forward`` somebody else has replaced are left alone, so blocks may be nested.

    Args:
        model: an adapted model; its base is frozen.
    """
    fused: list[nn.Module] = []
    projections: list[Projections] = []
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        taken = fused_projections(module)
        if taken is not None:
            projections.append(taken)
        made = low_rank_forward(module) or norm_forward(module) or gated_forward(module)
        if made is not None:
            module.forward = made
            fused.append(module)
    try:
        with fused_rotary(model):
            yield
    finally:
        for taken in projections:
            taken.remove()
        for module in fused:
            del module.forward
