"""The gated unit of Llama's and its relatives' feed-forward layers, ``silu(gate) * up``.

What is kept for the backward pass is gate and up. ``silu(gate)`` and the result, two more tensors of this size that
autograd would keep, are computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qmemtune.engine.fused.devices import FUSED, kernels_for
from qmemtune.engine.fused.low_rank import at_one_input
from qmemtune.engine.fused.remade import Remade, mark
from qmemtune.engine.fused.room import passing

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _GatedUnit(torch.autograd.Function):
    """``silu(gate) * up``; all (..., I)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, remade: Remade) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.remade = remade
        if (kernels := kernels_for(gate)) is not None:
            result: Tensor = kernels.gated(gate, up)
            return result
        return _opened(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if (kernels := kernels_for(gate)) is not None:
            return *kernels.gated_backward(grad, gate, up), None
        opened = ctx.remade.by_product()
        grad_up = (_opened(gate) if opened is None else opened).mul_(grad)
        grad_gate = torch.mul(grad, up, out=passing(grad))
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up, None


def _again(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    if (kernels := kernels_for(gate)) is not None:
        return kernels.gated(gate, up), None
    opened = _opened(gate)
    return torch.mul(opened, up, out=passing(gate)), opened


def _opened(gate: Tensor) -> Tensor:
    opened: Tensor = torch.ops.aten.silu.out(gate, out=passing(gate))
    return opened


def gated_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for a feed-forward layer ``down(silu(gate(x)) * up(x))``; None for any other layer.

    What a layer computes is tried, not read off its parts: some families multiply or clamp in between.
    """
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
        return None
    if not isinstance(module.act_fn, nn.SiLU) and type(module.act_fn).__name__ != "SiLUActivation":
        return None
    if not type(module).__name__.endswith("MLP") or {name for name, _ in module.named_children()} != set(PARTS):
        return None
    if not _same(module):
        return None
    plain = module.forward
    gate_and_up = at_one_input([module.gate_proj, module.up_proj])  # type: ignore[list-item]

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or x.device.type not in FUSED:
            result: Tensor = plain(x)
            return result
        gate, up = gate_and_up(x)
        remade = Remade(_again)
        hidden = mark(_GatedUnit.apply(gate, up, remade), remade, gate, up)
        down: Tensor = module.down_proj(hidden)  # type: ignore[operator]
        return down

    return forward


class _Times(nn.Module):
    """Stands for a projection."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@torch.no_grad()
def _same(module: nn.Module) -> bool:
    """Whether the layer's own forward, with other projections, makes what the fused one makes."""
    x = torch.linspace(-60.0, 60.0, 64).to(torch.bfloat16)
    if isinstance(x, FakeTensor):
        # Nothing to compare where tensors have no numbers.
        return True
    probe = copy.copy(module)
    down = _Times(0.25)
    parts = {"gate_proj": _Times(0.5), "up_proj": _Times(2.0), "down_proj": down, "act_fn": module.act_fn}
    probe.__dict__.update(_modules=parts)
    try:
        own = type(module).forward(probe, x)
    except Exception:  # noqa: BLE001 - a model's own code may ask more of its projections
        return False
    return isinstance(own, Tensor) and torch.equal(own, down(_opened(x * 0.5).mul_(x * 2.0)))
