"""Rotary position embedding of queries and keys, as Llama and its relatives compute it.

Written in torch's elementwise operations it negates, joins, multiplies twice and adds, in both passes; here are a
product with the cosines and one more addition for each half.

Letters: B rows, H heads, T tokens, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qmemtune.engine.fused.devices import FUSED, kernels_for
from qmemtune.engine.fused.room import PASSING, empty

NAME = "apply_rotary_pos_emb"
"""Function of transformers' model files."""


class _Rotated(torch.autograd.Function):
    """``x * cos + (-x2, x1) * sin`` for x = (x1, x2); x (B, H, T, D), cos and sin (B or 1, 1, T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if (kernels := kernels_for(x)) is not None:
            made: Tensor = kernels.rotated(x, cos, sin)
            return made
        half = x.shape[-1] // 2
        result = x * cos
        result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        result[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if (kernels := kernels_for(grad)) is not None:
            return kernels.rotated(grad, cos, sin, backward=True), None, None
        half = grad.shape[-1] // 2
        # In the order of the projections' results, (B, T, H, D), in which they will be read.
        rows, heads, tokens, width = grad.shape
        result = empty(grad, (rows, tokens, heads, width), grad.dtype, PASSING).transpose(1, 2)
        torch.mul(grad, cos, out=result)
        result[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        result[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return result, None, None


def rotated(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``apply_rotary_pos_emb`` in its fused form where gradients are wanted, else as it was."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ordinary = torch.is_grad_enabled() and q.device.type in FUSED and not args and not kwargs
        same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        same = same and q.device == k.device == cos.device
        if not (ordinary and same and q.requires_grad and k.requires_grad and not cos.requires_grad):
            return plain(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)

    return apply


@contextmanager
def fused_rotary(model: nn.Module) -> Iterator[None]:
    """While open, the model files of a model's layers have the fused form, where theirs computes the same."""
    names = {type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")}
    changed: list[tuple[ModuleType, Any]] = []
    for name in sorted(names):
        file = sys.modules.get(name)
        plain = getattr(file, NAME, None)
        if file is not None and plain is not None and getattr(plain, "__module__", None) == name and _same(plain):
            changed.append((file, plain))
            setattr(file, NAME, rotated(plain))
    try:
        yield
    finally:
        for file, plain in reversed(changed):
            setattr(file, NAME, plain)


def _same(plain: Callable[..., Any]) -> bool:
    """Whether a file's function gives the fused result on a few numbers."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        q, k = torch.linspace(-1, 1, 48).view(1, 3, 2, 8), torch.linspace(2, -1, 16).view(1, 1, 2, 8)
        cos, sin = torch.linspace(0, 1, 16).view(1, 2, 8), torch.linspace(1, -1, 16).view(1, 2, 8)
        try:
            own = plain(q, k, cos, sin)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        fused = [_Rotated.apply(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k)]
        return (
            isinstance(own, tuple)
            and len(own) == 2
            and all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(own, fused, strict=True))
        )
