"""Applying a routed operator to low-rank states: many small products, one a token.

Batched matrix-vector products of size R are far below what CPU libraries are made for, in the backward pass above all:
their outer products cost several times the elementwise ones used here (384 tokens, R = 16, one thread: 1.9 ms for
autograd's backward of ``bmm``, 0.3 ms for this one). On a GPU ``matmul`` is the better choice both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ApplyOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, operator: Tensor) -> Tensor:
        ctx.save_for_backward(z, operator)
        return z + (operator @ z.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, operator = ctx.saved_tensors
        grad_z = grad_operator = None
        column = grad.unsqueeze(-1)
        if ctx.needs_input_grad[0]:
            if grad.is_cuda:
                grad_z = grad + (operator.transpose(-1, -2) @ column).squeeze(-1)
            else:
                grad_z = grad + (operator * column).sum(dim=-2)
        if ctx.needs_input_grad[1]:
            grad_operator = column * z.unsqueeze(-2)
        return grad_z, grad_operator


def apply_operator(z: Tensor, operator: Tensor) -> Tensor:
    """``(I + operator) z`` for every token. Shapes: z (..., R), operator (..., R, R) of z's type; result (..., R)."""
    result: Tensor = _ApplyOperator.apply(z, operator)
    return result
