"""Adapted linear layers: base product, low-rank state and update with as few passes over large tensors as there can be.

As modules, LoRA casts its input twice, multiplies a tensor as large as the layer's output by the scaling and adds it,
in both passes, and leaves two gradients of the input to be summed. Here the update is added by the product that makes
it, and so is its part of the input's gradient.

Letters: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qmemtune.adapters.queryable.apply import OperatorGradient, add_update, back_through_route, through_route
from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.engine.fused.devices import FUSED, autocast_type
from qmemtune.engine.fused.remade import Remade, marked
from qmemtune.engine.fused.room import HANDED_ON, PASSING, empty
from qmemtune.models.dequantized import dequantized_weight, is_plain_4bit

WeightOf = Callable[[torch.dtype], Tensor | None]
"""The base layer's weight (O, I) in a type, None where it is not to be had in that type. Asked in each pass: some make
it anew, and then it is not kept in between."""


@dataclass(frozen=True)
class _Base:
    """A base layer in one pass."""

    weight_of: WeightOf
    weight: Tensor
    """In the type of the pass; used in the forward pass only."""
    bias: Tensor | None
    """Frozen, (O,), of the same type."""
    scaling: float
    """Of the update."""


class _BasesAndStates(torch.autograd.Function):
    """``W x + bias`` and ``A x`` of layers at one input, as one node: for a block's first, whose states form its route.

    The gradients of x are added by the products that make them, and all states are one product. Gate and up of
    SmolLM2-135M, 1,360 tokens in float32, one AVX2 core: 2 to 7 % of both passes through the two layers.

    Shapes: x (N, I), factors A (R, I); the layers' results (N, O), then their states (N, R). Two dimensions, because
    with more of them a result may be a view, which nothing may be added to in place. Where x can be made again, of what
    follows the factors, it is not kept.
    """

    PLACE = 3
    """Of the first factor among the arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: Sequence[_Base], remade: Remade | None, *factors_and_kept: Tensor
    ) -> tuple[Tensor, ...]:
        factors, kept = factors_and_kept[: len(bases)], factors_and_kept[len(bases) :]
        states, cast = _states(x, factors)
        ctx.save_for_backward(cast, *_kept(ctx, x, remade, kept, _BasesAndStates.PLACE, len(bases)))
        ctx.weights_of, ctx.remade = [base.weight_of for base in bases], remade
        ctx.factors = [(len(factor), factor.dtype) for factor in factors]
        return *_products(x, bases, x.shape[:1]), *_split(states, ctx.factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *both: Tensor) -> tuple[Tensor | None, ...]:
        cast, *kept = ctx.saved_tensors
        grads, states = both[: len(ctx.factors)], both[len(ctx.factors) :]
        grad_states = torch.cat(states, dim=1) if len(states) > 1 else states[0]
        grad_x = _input_gradient(ctx, grads, grad_states, cast) if ctx.needs_input_grad[0] else None
        grad_factors = _factor_gradients(ctx, grad_states, kept, _BasesAndStates.PLACE)
        return grad_x, None, None, *grad_factors, *[None] * (len(kept) if ctx.remade else 0)


class _AdaptedLayers(torch.autograd.Function):
    """``W x + bias + scaling * B (C A x)`` of layers at one input, as one node; C is the identity without a route.

    Updates and gradients are added in place by the products that make them.

    Shapes: x (..., I), factors A (R, I), then as many factors B (O, R); results (..., O). Routed operators C
    (..., R, R), float32; their gradient goes through ``joint``, see :class:`OperatorGradient`. What follows the factors
    is what x can be made of again.
    """

    PLACE = 5

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bases: Sequence[_Base],
        remade: Remade | None,
        gradient: OperatorGradient | None,
        joint: Tensor | None,
        *factors_and_kept: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(bases)
        factors, outer = factors_and_kept[:count], factors_and_kept[count : 2 * count]
        # As they are, not as views that autograd knows: each of those is a node more in both passes.
        flat, ctx.shape = x.reshape(x.shape[:-1].numel(), x.shape[-1]), x.shape[:-1]
        ctx.factors = [(len(factor), factor.dtype) for factor in factors]
        states, cast = _states(flat, factors)
        routed = None if gradient is None else gradient.flat
        through = states if routed is None else through_route(routed, states)
        inner = _split(through, ctx.factors)
        outer_cast = [factor.to(x.dtype) for factor in outer]
        results = _products(flat, bases, ctx.shape)
        for result, base, state, factor in zip(results, bases, inner, outer_cast, strict=True):
            result.view(len(flat), len(factor)).addmm_(state, factor.t(), alpha=base.scaling)
        kept = _kept(ctx, flat, remade, factors_and_kept[2 * count :], _AdaptedLayers.PLACE, count)
        ctx.save_for_backward(cast, states, through, *outer_cast, *kept)
        ctx.weights_of, ctx.scalings = [base.weight_of for base in bases], [base.scaling for base in bases]
        ctx.remade, ctx.gradient, ctx.routed = remade, gradient, routed
        ctx.outer_type = outer[0].dtype
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, place = len(grads), _AdaptedLayers.PLACE
        cast, states, through, *saved = ctx.saved_tensors
        outer, kept = saved[:count], saved[count:]
        inner = _split(through, ctx.factors)
        wanted = ctx.needs_input_grad
        grad_outer: list[Tensor | None] = [None] * count
        grad_inner = []
        grads = tuple(grad.reshape(len(states), len(factor)) for grad, factor in zip(grads, outer, strict=True))
        for i, (grad, factor, state, scaling) in enumerate(zip(grads, outer, inner, ctx.scalings, strict=True)):
            if wanted[place + count + i]:
                grad_outer[i] = product(state.t(), grad, ctx.outer_type).t().mul_(scaling)
            grad_inner.append(scaled_product(grad, factor, scaling))
        grad_states = torch.cat(grad_inner, dim=1) if count > 1 else grad_inner[0]
        if ctx.gradient is not None:
            if wanted[4]:
                ctx.gradient.leave(grad_states, states)
            grad_states = back_through_route(ctx.routed, grad_states)
        grad_x = _input_gradient(ctx, grads, grad_states, cast) if wanted[0] else None
        grad_factors = _factor_gradients(ctx, grad_states, kept, place)
        if grad_x is not None:
            grad_x = grad_x.view(*ctx.shape, grad_x.shape[-1])
        others = [None] * (len(kept) if ctx.remade else 0)
        # Behind the joint is what takes the gradient that was left: it is reached without a number of its own.
        return grad_x, None, None, None, None, *grad_factors, *grad_outer, *others


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in a type; on a GPU without rounding to that of the factors in between."""
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right``; one kernel on a GPU."""
    if left.is_cuda:
        return torch.addmm(left.new_empty(right.shape[1]), left, right, beta=0, alpha=scaling)
    return (left @ right).mul_(scaling)


def _states(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Low-rank states of all layers, (N, sum of R), and the factors in the type of x, as one."""
    # One layer's factor alone is not copied.
    cast = torch.cat([factor.to(x.dtype) for factor in factors]) if len(factors) > 1 else factors[0].to(x.dtype)
    return F.linear(x, cast), cast


def _split(states: Tensor, factors: Sequence[tuple[int, torch.dtype]]) -> Sequence[Tensor]:
    return states.split([rank for rank, _ in factors], dim=1) if len(factors) > 1 else (states,)


def _kept(
    ctx: Any, x: Tensor, remade: Remade | None, kept: tuple[Tensor, ...], place: int, factors: int
) -> tuple[Tensor, ...]:
    """What is kept of the input: itself, or what it is made of."""
    if remade is None:
        return (x,)
    if any(ctx.needs_input_grad[place : place + factors]):
        remade.expect()
    return kept


def _products(x: Tensor, bases: Sequence[_Base], shape: Sequence[int]) -> list[Tensor]:
    """The base layers' own results for x (N, I), each (..., O) with these leading dimensions."""
    results = []
    for base in bases:
        # No view of two dimensions: a model may change a layer's result, and not one that is a view made in here.
        result = empty(x, (*shape, len(base.weight)), x.dtype, HANDED_ON)
        flat = result.view(len(x), len(base.weight))
        if base.bias is None:
            torch.mm(x, base.weight.t(), out=flat)
        else:
            torch.addmm(base.bias, x, base.weight.t(), out=flat)
        results.append(result)
    return results


def _input_gradient(ctx: Any, grads: Sequence[Tensor], grad_states: Tensor, cast: Tensor) -> Tensor:
    grad_x = empty(cast, (len(grad_states), cast.shape[1]), cast.dtype, PASSING)
    torch.mm(grads[0], ctx.weights_of[0](cast.dtype), out=grad_x)
    for grad, weight_of in zip(grads[1:], ctx.weights_of[1:], strict=True):
        grad_x.addmm_(grad, weight_of(cast.dtype))
    return grad_x.addmm_(grad_states, cast)


def _factor_gradients(ctx: Any, grad_states: Tensor, kept: Sequence[Tensor], place: int) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[place : place + len(ctx.factors)]
    if not any(wanted):
        return [None] * len(wanted)
    x = kept[0] if ctx.remade is None else ctx.remade.take(*kept).flatten(0, -2)
    dtype = ctx.factors[0][1]
    parts: Sequence[Tensor] = (product(grad_states.t(), x, dtype),)
    if len(wanted) > 1:
        parts = parts[0].split([rank for rank, _ in ctx.factors])
    return [part if asked else None for part, asked in zip(parts, wanted, strict=True)]


@dataclass(frozen=True)
class Adapted:
    """An adapted layer with a fused form."""

    module: Any
    factors: Any
    """A of each adapter, by name."""
    weight_of: WeightOf
    outer: Any
    """B of each adapter, by name."""
    fits: Callable[[Any, str], bool]
    """Whether an adapter of this name does nothing that the fused form does not."""

    @classmethod
    def of(cls, module: Any) -> Adapted | None:
        if isinstance(module, QueryableLinear):
            factors, outer, fits = module.queryable_A, module.queryable_B, _queryable_fits
        elif isinstance(module, LoraLayer) and (
            isinstance(module, LoraLinear) or type(module).__name__ == "Linear4bit"
        ):
            factors, outer, fits = module.lora_A, module.lora_B, _lora_fits
        else:
            return None
        weight_of = _weight_of(module.base_layer)
        return None if weight_of is None else cls(module, factors, weight_of, outer, fits)

    @property
    def inputs(self) -> int:
        """Features of the layer's input."""
        features: int = self.module.in_features
        return features

    def adapter(self) -> str | None:
        """The only active adapter's name; None where the layer's own forward is to run."""
        if self.module.disable_adapters or self.module.merged:
            return None
        names = [name for name in self.module.active_adapters if name in self.module.scaling]
        return names[0] if len(names) == 1 and self.fits(self.module, names[0]) else None


def together(layers: Sequence[Adapted], x: Tensor) -> list[Tensor] | None:
    """The outputs of layers at one input; None unless this is an ordinary training pass of each."""
    if not (torch.is_grad_enabled() and x.device.type in FUSED and x.is_floating_point() and x.dim() > 1):
        return None
    names = [name for layer in layers if (name := layer.adapter()) is not None]
    if len(names) < len(layers):
        return None
    kind = autocast_type(x.device) or x.dtype
    bases = []
    for layer, name in zip(layers, names, strict=True):
        # Last of what is asked: some make it anew.
        weight = layer.weight_of(kind)
        if weight is None or weight.device != x.device:
            return None
        bias = layer.module.base_layer.bias
        scaling = layer.module.scaling[name]
        bases.append(_Base(layer.weight_of, weight, None if bias is None else bias.to(kind), scaling))
    if x.dtype != kind:
        x = x.to(kind)
    remade, kept = marked(x)
    # Detached: gradients go through x alone.
    kept = tuple(tensor.detach() for tensor in kept)
    factors = [layer.factors[name].weight for layer, name in zip(layers, names, strict=True)]
    outer = [layer.outer[name].weight for layer, name in zip(layers, names, strict=True)]
    gradient = joint = None
    if isinstance(layers[0].module, QueryableLinear):
        routes = [layer.module.formed_route(name) for layer, name in zip(layers, names, strict=True)]
        route = routes[0]
        there = route is not None and route.device == x.device and route.shape[:-2] == x.shape[:-1]
        if route is None or not (there and route.requires_grad and all(other is route for other in routes)):
            return _routed_one_by_one(layers, names, bases, remade, x, factors, kept)
        gradient, joint = OperatorGradient.of(route)
    return list(_AdaptedLayers.apply(x, bases, remade, gradient, joint, *factors, *outer, *kept))


def _routed_one_by_one(
    layers: Sequence[Adapted],
    names: Sequence[str],
    bases: Sequence[_Base],
    remade: Remade | None,
    x: Tensor,
    factors: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> list[Tensor]:
    """The outputs of layers of a memory whose route is not there yet, or not as they need it."""
    made = _BasesAndStates.apply(x.flatten(0, -2), bases, remade, *factors, *kept)
    results, states = made[: len(layers)], made[len(layers) :]
    outputs = []
    for layer, name, base, result, state in zip(layers, names, bases, results, states, strict=True):
        z = state.unflatten(0, x.shape[:-1])
        routed = layer.module.routed(name, x, z)
        updated = add_update(result, z, routed, layer.outer[name].weight, base.scaling)
        outputs.append(updated.unflatten(0, x.shape[:-1]))
    return outputs


def low_rank_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """A forward for a layer adapted with plain LoRA or a queryable memory; None for any other layer.

    Calls that are not an ordinary training pass (no gradient, dropout, several adapters, a switched-off or merged one)
    go through the layer's own forward.
    """
    layer = Adapted.of(module)
    if layer is None:
        return None
    plain = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs = None if args or kwargs else together([layer], x)
        own: Tensor = plain(x, *args, **kwargs) if outputs is None else outputs[0]
        return own

    return forward


def at_one_input(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """A call of several layers with the same input, which goes through one node where all of them have a fused form."""
    found = [None if "forward" in module.__dict__ else Adapted.of(module) for module in modules]
    layers = [layer for layer in found if layer is not None]

    def call(x: Tensor) -> Sequence[Tensor]:
        if len(layers) == len(modules) and not any(map(_has_hooks, modules)):
            outputs = together(layers, x)
            if outputs is not None:
                return outputs
        return [module(x) for module in modules]

    return call


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _lora_fits(layer: Any, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
    other = name in layer.lora_variant or layer.lora_bias[name] or getattr(layer, "fan_in_fan_out", False)
    return not drops and not other


def _queryable_fits(layer: Any, name: str) -> bool:
    return not (layer.dropout[name] and layer.training)


def _weight_of(base: Any) -> WeightOf | None:
    """Where the frozen weight of a base layer is to be had."""
    if type(base) is nn.Linear and "forward" not in base.__dict__:
        if base.weight.requires_grad or base.weight.device.type not in FUSED:
            return None
        return lambda dtype: base.weight if base.weight.dtype == dtype else None
    if base.weight.device.type in FUSED and is_plain_4bit(base) and "forward" not in base.__dict__:
        return partial(dequantized_weight, base)
    return getattr(base.__dict__.get("forward"), "weight_in", None)
