"""Applying routed operators to low-rank states, and adding the update to a base layer's output.

Tensor letters: R rank, O output features; ``...`` are the tokens of a layer's input.

Both are written out because the obvious way is slow. Batched products of size R are far below what CPU libraries are
made for: their outer products in the backward pass, and any elementwise product in bfloat16 that broadcasts, cost
several times the float32 elementwise ones used here (1,024 tokens, R = 16, one AVX-512 core: 0.61 ms for the outer
product in bfloat16, 0.04 ms in float32). And ``result + scaling * B(v)`` walks three times over a tensor as large as
the layer's output; one ``addmm`` in place does it in none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qmemtune.adapters.queryable.devices import no_autocast, triton_kernels

KERNELS = "qmemtune.adapters.queryable.kernels"


def routed_product(routed: Tensor, z: Tensor) -> Tensor:
    """``C z``, one small product a token, without gradient. Shapes: routed (..., R, R), z (..., R), of one type."""
    # On a CPU torch computes products of less than 400 multiplications by itself, and fast; larger ones it hands on.
    if routed.is_cuda or z.dtype != torch.float32 or z.shape[-1] ** 2 < 400:
        return (routed @ z.unsqueeze(-1)).squeeze(-1)
    return (routed * z.unsqueeze(-2)).sum(dim=-1)


def _transposed_product(routed: Tensor, grad: Tensor) -> Tensor:
    """``C^T g``. Shapes as :func:`routed_product`."""
    if routed.is_cuda:
        return (routed.transpose(-1, -2) @ grad.unsqueeze(-1)).squeeze(-1)
    return (routed * grad.unsqueeze(-1)).sum(dim=-2)


def through_route(routed: Tensor, z: Tensor) -> Tensor:
    """``C z`` of each token, without gradient. Shapes: routed (N, R, R), float32, contiguous; z and result (N, R)."""
    if (kernels := triton_kernels(KERNELS, z)) is not None:
        result: Tensor = kernels.routed(routed, z)
        return result
    with no_autocast(z.device):
        return routed_product(routed, z.to(routed.dtype)).to(z.dtype)


def back_through_route(routed: Tensor, grad: Tensor) -> Tensor:
    """``C^T g``. Shapes as :func:`through_route`."""
    if (kernels := triton_kernels(KERNELS, grad)) is not None:
        result: Tensor = kernels.routed(routed, grad, transposed=True)
        return result
    with no_autocast(grad.device):
        return _transposed_product(routed, grad.to(routed.dtype)).to(grad.dtype)


class _ApplyOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, routed: Tensor) -> Tensor:
        ctx.save_for_backward(z, routed)
        return routed_product(routed, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, routed = ctx.saved_tensors
        grad_z = _transposed_product(routed, grad) if ctx.needs_input_grad[0] else None
        grad_routed = grad.unsqueeze(-1) * z.unsqueeze(-2) if ctx.needs_input_grad[1] else None
        return grad_z, grad_routed


def apply_operator(z: Tensor, routed: Tensor) -> Tensor:
    """``C z`` for every token. Shapes: z (..., R), routed operator C (..., R, R), both float32; result (..., R)."""
    result: Tensor = _ApplyOperator.apply(z, routed)
    return result


class OperatorGradient:
    """The gradient of a block's routed operator, taken once for all layers that apply it.

    Each layer's part is an outer product a token, as large as the operator; of 35 layers of 1,360 tokens, R = 16, one
    AMX core: 7.3 ms one by one, 0.9 ms as one batched product. So layers leave their factors here, and a node through
    which all of them are joined to the operator makes the gradient when the last one has.

    Args:
        routed: C, (..., R, R), float32.
    """

    NAME = "_qmemtune_gradient"

    def __init__(self, routed: Tensor) -> None:
        self.routed = routed.detach()
        self._flat: Tensor | None = None
        self._run = -1
        self._left: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, routed: Tensor) -> tuple[OperatorGradient, Tensor]:
        """The one of an operator that needs a gradient, made at the first call, and what joins layers to it."""
        # Both on the operator: the node behind the second holds the first, which must not hold it in turn. Such a
        # cycle outlives its step, and what it keeps tears the heap apart.
        found: tuple[OperatorGradient, Tensor] | None = getattr(routed, cls.NAME, None)
        if found is None:
            gradient = cls(routed)
            found = gradient, _Join.apply(routed, gradient)
            setattr(routed, cls.NAME, found)
        return found

    @property
    def flat(self) -> Tensor:
        """C of each token, (N, R, R), contiguous; of one route a row a copy, the same for all layers."""
        if self._flat is None:
            rank = self.routed.shape[-1]
            self._flat = self.routed.reshape(self.routed.shape[:-2].numel(), rank, rank).contiguous()
        return self._flat

    def leave(self, grad: Tensor, z: Tensor) -> None:
        """A layer's factors, (..., R) each."""
        self._forget_other_runs()
        flat = (self.routed.shape[:-2].numel(), z.shape[-1])
        self._left.append((grad.to(z.dtype).reshape(flat), z.reshape(flat)))

    def _forget_other_runs(self) -> None:
        # A backward pass that was asked for some gradients only, or was cut off, takes nothing of what it left.
        run = torch._C._current_graph_task_id()
        if run != self._run:
            self._run, self._left = run, []

    def take(self) -> Tensor:
        """The sum of the outer products of all layers in this backward pass, (..., R, R)."""
        self._forget_other_runs()
        left, self._left = self._left, []
        if not left:
            return torch.zeros_like(self.routed)
        grads, states = (torch.stack(parts, dim=1).to(self.routed.dtype) for parts in zip(*left, strict=True))
        return torch.bmm(grads.transpose(1, 2), states).view(self.routed.shape)


class _Join(torch.autograd.Function):
    """A number that stands for the operator in the graph; its gradient is the operator's."""

    @staticmethod
    def forward(ctx: Any, routed: Tensor, gradient: OperatorGradient) -> Tensor:
        ctx.gradient = gradient
        return routed.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.take(), None


class _AddUpdate(torch.autograd.Function):
    """``result += scaling * B (C z)`` in place; keeps two low-rank states a token besides what is shared."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        z: Tensor,
        routed: Tensor,
        weight: Tensor,
        scaling: float,
        gradient: OperatorGradient | None,
        joint: Tensor | None,
    ) -> Tensor:
        with no_autocast(result.device):
            state = routed_product(routed, z.to(routed.dtype)).to(result.dtype)
            cast = weight.to(result.dtype)
            result.view(-1, result.shape[-1]).addmm_(state.flatten(0, -2), cast.t(), alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(z, routed, cast, state)
        ctx.scaling, ctx.weight_dtype, ctx.gradient = scaling, weight.dtype, gradient
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, routed, weight, state = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_z = grad_routed = grad_weight = None
        with no_autocast(grad.device):
            if ctx.needs_input_grad[3]:
                grad_weight = (state.flatten(0, -2).t() @ flat).t().to(ctx.weight_dtype) * ctx.scaling
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or ctx.needs_input_grad[6]:
                inner = ((flat @ weight).to(routed.dtype) * ctx.scaling).view(z.shape)
                if ctx.needs_input_grad[1]:
                    grad_z = _transposed_product(routed, inner).to(z.dtype)
                if ctx.needs_input_grad[2]:
                    grad_routed = inner.unsqueeze(-1) * z.to(routed.dtype).unsqueeze(-2)
                if ctx.needs_input_grad[6]:
                    ctx.gradient.leave(inner, z)
        # What takes the gradient that was left is reached through the joint without a number.
        return grad, grad_z, grad_routed, grad_weight, None, None, None


def add_update(result: Tensor, z: Tensor, routed: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """``result + scaling * B (C z)``; ``result`` itself is changed where that is possible.

    Args:
        result: output of the base layer, (..., O), which nothing else needs any more.
        z: low-rank state, (..., R).
        routed: routed operator C, (..., R, R): float32 where gradients are wanted, else float32 or ``z``'s type.
        weight: B, (O, R).
        scaling: ``alpha / r``.

    Returns:
        (..., O), of ``result``'s type.
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the plain form by itself, and cannot look into the one above.
        state = routed_product(routed, z.to(routed.dtype)).to(result.dtype)
        return result + F.linear(state, weight.to(result.dtype)) * scaling
    if result._is_view() or not result.is_contiguous():
        result = result.clone(memory_format=torch.contiguous_format)
    gradient = joint = None
    if routed.requires_grad and torch.is_grad_enabled():
        gradient, joint = OperatorGradient.of(routed)
        routed = gradient.routed
    updated: Tensor = _AddUpdate.apply(result, z, routed, weight, scaling, gradient, joint)
    return updated


def add_update_without_gradient(result: Tensor, z: Tensor, routed: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """:func:`add_update` where nothing needs a gradient: fewer calls, which is what a decoded token costs."""
    update = F.linear((routed @ z.unsqueeze(-1)).squeeze(-1), weight)
    return result.add_(update, alpha=scaling)
