"""Adapted linear layers: base product, low-rank state and update with as few passes over large tensors as there can be.

As modules, LoRA casts its input twice, multiplies a tensor as large as the layer's output by the scaling and adds it,
in both passes, and leaves two gradients of the input to be summed. Here the update is added by the product that makes
it, and so is its part of the input's gradient.

Letters: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qmemtune.adapters.queryable.apply import add_update
from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.engine.fused.remade import Remade, marked
from qmemtune.engine.fused.room import HANDED_ON, PASSING, empty
from qmemtune.models.dequantized import dequantized_weight, is_4bit_on_cpu

WeightOf = Callable[[torch.dtype], Tensor | None]
"""The base layer's weight (O, I) in a type, None where it is not to be had in that type. Asked in each pass: some make
it anew, and then it is not kept in between."""


class _BaseAndState(torch.autograd.Function):
    """``W x + bias`` and ``A x`` as one node, whose gradients of x are added by the second product.

    Shapes: x (N, I), weight (O, I), bias (O,) frozen or None, factor A (R, I); results (N, O), (N, R). Two
    dimensions, because with more of them a result may be a view, which nothing may be added to in place. Where x can be
    made again, of ``kept``, it is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_of: WeightOf,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor,
        remade: Remade | None,
        *kept: Tensor,
    ) -> tuple[Tensor, Tensor]:
        cast = factor.to(x.dtype)
        if remade is None:
            kept = (x,)
        elif ctx.needs_input_grad[4]:
            remade.expect()
        ctx.save_for_backward(cast, *kept)
        ctx.weight_of, ctx.factor_dtype, ctx.remade = weight_of, factor.dtype, remade
        result = empty(x, (len(x), len(weight)), x.dtype, HANDED_ON)
        if bias is None:
            torch.mm(x, weight.t(), out=result)
        else:
            torch.addmm(bias, x, weight.t(), out=result)
        return result, F.linear(x, cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        factor, *kept = ctx.saved_tensors
        grad_x = grad_factor = None
        if ctx.needs_input_grad[0]:
            weight = ctx.weight_of(grad.dtype)
            grad_x = empty(grad, (len(grad), weight.shape[1]), grad.dtype, PASSING)
            torch.mm(grad, weight, out=grad_x).addmm_(grad_state, factor)
        if ctx.needs_input_grad[4]:
            x = kept[0] if ctx.remade is None else ctx.remade.take(*kept).flatten(0, -2)
            grad_factor = (grad_state.t() @ x).to(ctx.factor_dtype)
        return grad_x, None, None, None, grad_factor, None, *[None] * (len(kept) if ctx.remade else 0)


class _AddLowRank(torch.autograd.Function):
    """``result += scaling * B z`` in place; result (N, O), state z (N, R), factor B (O, R)."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, state: Tensor, factor: Tensor, scaling: float) -> Tensor:
        cast = factor.to(result.dtype)
        result.addmm_(state, cast.t(), alpha=scaling)
        ctx.mark_dirty(result)
        ctx.save_for_backward(state, cast)
        ctx.scaling, ctx.factor_dtype = scaling, factor.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        state, factor = ctx.saved_tensors
        grad_state = grad_factor = None
        if ctx.needs_input_grad[1]:
            grad_state = (grad @ factor).mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            grad_factor = (state.t() @ grad).t().to(ctx.factor_dtype).mul_(ctx.scaling)
        return grad, grad_state, grad_factor, None


def _base_and_state(
    x: Tensor, weight_of: WeightOf, weight: Tensor, bias: Tensor | None, factor: Tensor
) -> tuple[Tensor, Tensor]:
    remade, kept = marked(x)
    # Detached: gradients go through x alone.
    kept = tuple(tensor.detach() for tensor in kept)
    made: tuple[Tensor, Tensor] = _BaseAndState.apply(x.flatten(0, -2), weight_of, weight, bias, factor, remade, *kept)
    return made


def low_rank_forward(module: Any) -> Callable[..., Tensor] | None:
    """A forward for a layer adapted with plain LoRA or a queryable memory, on a CPU; None for any other layer.

    Calls that are not an ordinary training pass (no gradient, dropout, several adapters, a switched-off or merged one)
    go through the layer's own forward.
    """
    if isinstance(module, QueryableLinear):
        fits, adapted = _queryable_fits, _queryable
    elif isinstance(module, LoraLayer) and (isinstance(module, LoraLinear) or type(module).__name__ == "Linear4bit"):
        fits, adapted = _lora_fits, _lora
    else:
        return None
    base: Any = module.base_layer
    weight_of = _weight_of(base)
    if weight_of is None:
        return None
    plain = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ordinary = torch.is_grad_enabled() and not args and not kwargs and x.device.type == "cpu"
        if ordinary and x.is_floating_point() and x.dim() > 1 and not module.disable_adapters and not module.merged:
            names = [name for name in module.active_adapters if name in module.scaling]
            kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            # The weight last: some make it anew.
            if len(names) == 1 and fits(module, names[0]) and (weight := weight_of(kind)) is not None:
                bias = None if base.bias is None else base.bias.to(kind)
                updated = adapted(module, names[0], x.to(kind), weight_of, weight, bias)
                return updated.unflatten(0, x.shape[:-1])
        own: Tensor = plain(x, *args, **kwargs)
        return own

    return forward


def _lora_fits(layer: Any, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
    other = name in layer.lora_variant or layer.lora_bias[name] or getattr(layer, "fan_in_fan_out", False)
    return not drops and not other


def _lora(layer: Any, name: str, x: Tensor, weight_of: WeightOf, weight: Tensor, bias: Tensor | None) -> Tensor:
    result, state = _base_and_state(x, weight_of, weight, bias, layer.lora_A[name].weight)
    updated: Tensor = _AddLowRank.apply(result, state, layer.lora_B[name].weight, layer.scaling[name])
    return updated


def _queryable_fits(layer: Any, name: str) -> bool:
    return not (layer.dropout[name] and layer.training)


def _queryable(layer: Any, name: str, x: Tensor, weight_of: WeightOf, weight: Tensor, bias: Tensor | None) -> Tensor:
    result, state = _base_and_state(x, weight_of, weight, bias, layer.queryable_A[name].weight)
    state = state.unflatten(0, x.shape[:-1])
    routed = layer.routed(name, x, state)
    return add_update(result, state, routed, layer.queryable_B[name].weight, layer.scaling[name])


def _weight_of(base: Any) -> WeightOf | None:
    """Where the frozen weight of a base layer is to be had."""
    if type(base) is nn.Linear and "forward" not in base.__dict__:
        if base.weight.requires_grad or base.weight.device.type != "cpu":
            return None
        return lambda dtype: base.weight if base.weight.dtype == dtype else None
    if is_4bit_on_cpu(base) and "forward" not in base.__dict__:
        return partial(dequantized_weight, base)
    return getattr(base.__dict__.get("forward"), "weight_in", None)
