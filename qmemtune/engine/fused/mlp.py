"""The gated unit of Llama's and its relatives' feed-forward layers, ``silu(gate) * up``.

What is kept for the backward pass is gate and up; ``silu(gate)``, the third tensor of this size that autograd would
keep, is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _GatedUnit(torch.autograd.Function):
    """``silu(gate) * up``; all (..., I)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate) * grad


def gated_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for a feed-forward layer ``down(silu(gate(x)) * up(x))``; None for any other layer."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in PARTS):
        return None
    if not isinstance(module.act_fn, nn.SiLU) and type(module.act_fn).__name__ != "SiLUActivation":
        return None
    if not type(module).__name__.endswith("MLP") or {name for name, _ in module.named_children()} != set(PARTS):
        return None
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or x.device.type != "cpu":
            result: Tensor = plain(x)
            return result
        hidden = _GatedUnit.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[operator]
        down: Tensor = module.down_proj(hidden)  # type: ignore[operator]
        return down

    return forward
