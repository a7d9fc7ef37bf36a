"""Applying routed operators to low-rank states, and adding the update to a base layer's output.

Tensor letters: R rank, O output features; ``...`` are the tokens of a layer's input.

Both are written out because the obvious way is slow. Products of size R, one a token, are far below what CPU libraries
are made for: in bfloat16 outer products in the backward pass, and any elementwise product that broadcasts, cost several
times the float32 ones used here (1,024 tokens, R = 16, one AVX-512 core: 0.61 ms for the outer product in bfloat16,
0.04 ms in float32). Layers at one input go through their operator together. Three of them, 1,024 tokens, on two Zen 4
cores, both passes in ms:

====  ===============================  ========
R     each state as a column, by turn  together
====  ===============================  ========
8     0.22                             0.12
16    0.36                             0.14
32    0.80                             0.35
64    6.3                              1.3
====  ===============================  ========

And ``result + scaling * B(v)`` walks three times over a tensor as large as the layer's output; one ``addmm`` in place
does it in none.
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
    # As a row through the transposed operator: CPU libraries are faster so, four times at R = 64.
    return (z.unsqueeze(-2) @ routed.transpose(-1, -2)).squeeze(-2)


def _transposed_product(routed: Tensor, grad: Tensor) -> Tensor:
    """``C^T g``. Shapes as :func:`routed_product`."""
    if _walks_columns(routed):
        return (routed * grad.unsqueeze(-1)).sum(dim=-2)
    return (grad.unsqueeze(-2) @ routed).squeeze(-2)


def _walks_columns(routed: Tensor) -> bool:
    """Whether torch would multiply single rows by these operators (..., R, R) number by number, down each column.

    On a CPU it computes products of fewer than 400 multiplications by itself; larger ones it hands on.
    """
    return not routed.is_cuda and routed.shape[-1] ** 2 < 400


def through_route(routed: Tensor, states: Tensor) -> Tensor:
    """``C z`` of each token and layer, without gradient.

    Shapes: routed (N, R, R), float32, contiguous; states and result (N, L * R), contiguous, of L layers side by side.
    """
    if (kernels := triton_kernels(KERNELS, states)) is not None:
        result: Tensor = kernels.routed(routed, states)
        return result
    return _rows_through(routed.transpose(1, 2), states)


def back_through_route(routed: Tensor, grads: Tensor) -> Tensor:
    """``C^T g``. Shapes as :func:`through_route`."""
    if (kernels := triton_kernels(KERNELS, grads)) is not None:
        result: Tensor = kernels.routed(routed, grads, transposed=True)
        return result
    if grads.shape[1] == routed.shape[1] and _walks_columns(routed):
        return _transposed_product(routed, grads.to(routed.dtype)).to(grads.dtype)
    return _rows_through(routed, grads)


def _rows_through(operators: Tensor, rows: Tensor) -> Tensor:
    """Each token's rows (N, L * R) times its operator (N, R, R), in the operators' type; result as the rows."""
    rank = operators.shape[-1]
    wide = rows.to(operators.dtype).view(len(rows), rows.shape[1] // rank, rank)
    # Into a tensor that is there already: autocast leaves such a product alone.
    made = torch.bmm(wide, operators, out=torch.empty_like(wide))
    return made.view(rows.shape).to(rows.dtype)


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

    def leave(self, grads: Tensor, states: Tensor) -> None:
        """The factors of layers, (..., R) each, or (N, L * R) of several side by side."""
        self._forget_other_runs()
        shape = (self.routed.shape[:-2].numel(), states.shape[-1] // self.routed.shape[-1], self.routed.shape[-1])
        self._left.append((grads.to(states.dtype).reshape(shape), states.reshape(shape)))

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
        grads, states = (torch.cat(parts, dim=1).to(self.routed.dtype) for parts in zip(*left, strict=True))
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
