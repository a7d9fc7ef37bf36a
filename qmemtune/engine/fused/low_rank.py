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

from qmemtune.adapters.queryable.apply import add_update
from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.engine.fused.devices import FUSED, autocast_type
from qmemtune.engine.fused.remade import Remade, marked
from qmemtune.engine.fused.room import HANDED_ON, PASSING, empty
from qmemtune.models.dequantized import dequantized_weight, is_plain_4bit

WeightOf = Callable[[torch.dtype], Tensor | None]
"""The base layer's weight (O, I) in a type, None where it is not to be had in that type. Asked in each pass: some make
it anew, and then it is not kept in between."""
FIRST_FACTOR = 3
"""Place of the first factor among the arguments of the node below."""


class _BasesAndStates(torch.autograd.Function):
    """``W x + bias`` and ``A x`` of one layer, or of several at one input, as one node.

    The gradients of x are added by the products that make them, and all states are one product. Gate and up of
    SmolLM2-135M, 1,360 tokens in float32, one AVX2 core: 2 to 7 % of both passes through the two layers.

    Shapes: x (N, I), weight (O, I), bias (O,) frozen or None, factor A (R, I); the layers' results (N, O), then their
    states (N, R). Two dimensions, because with more of them a result may be a view, which nothing may be added to in
    place. Where x can be made again, of what follows the factors, it is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[tuple[WeightOf, Tensor, Tensor | None]],
        remade: Remade | None,
        *factors_and_kept: Tensor,
    ) -> tuple[Tensor, ...]:
        factors, kept = factors_and_kept[: len(layers)], factors_and_kept[len(layers) :]
        # One layer's factor alone is not copied.
        cast = torch.cat([factor.to(x.dtype) for factor in factors]) if len(layers) > 1 else factors[0].to(x.dtype)
        if remade is None:
            kept = (x,)
        elif any(ctx.needs_input_grad[FIRST_FACTOR:]):
            remade.expect()
        ctx.save_for_backward(cast, *kept)
        ctx.weights_of = [weight_of for weight_of, _, _ in layers]
        ctx.remade = remade
        ctx.factors = [(len(factor), factor.dtype) for factor in factors]
        results = []
        for _, weight, bias in layers:
            result = empty(x, (len(x), len(weight)), x.dtype, HANDED_ON)
            if bias is None:
                torch.mm(x, weight.t(), out=result)
            else:
                torch.addmm(bias, x, weight.t(), out=result)
            results.append(result)
        states = F.linear(x, cast)
        return *results, *(states.split([len(factor) for factor in factors], dim=1) if len(layers) > 1 else (states,))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *both: Tensor) -> tuple[Tensor | None, ...]:
        cast, *kept = ctx.saved_tensors
        grads, states = both[: len(ctx.factors)], both[len(ctx.factors) :]
        grad_states = torch.cat(states, dim=1) if len(states) > 1 else states[0]
        grad_x = None
        grad_factors: list[Tensor | None] = [None] * len(ctx.factors)
        if ctx.needs_input_grad[0]:
            first, *others = zip(grads, ctx.weights_of, strict=True)
            grad_x = empty(cast, (len(grad_states), cast.shape[1]), cast.dtype, PASSING)
            torch.mm(first[0], first[1](cast.dtype), out=grad_x)
            for grad, weight_of in others:
                grad_x.addmm_(grad, weight_of(cast.dtype))
            grad_x.addmm_(grad_states, cast)
        wanted = ctx.needs_input_grad[FIRST_FACTOR : FIRST_FACTOR + len(ctx.factors)]
        if any(wanted):
            x = kept[0] if ctx.remade is None else ctx.remade.take(*kept).flatten(0, -2)
            parts = (grad_states.t() @ x).split([rank for rank, _ in ctx.factors])
            grad_factors = [
                part.to(dtype) if asked else None
                for part, (_, dtype), asked in zip(parts, ctx.factors, wanted, strict=True)
            ]
        return grad_x, None, None, *grad_factors, *[None] * (len(kept) if ctx.remade else 0)


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


@dataclass(frozen=True)
class _Adapted:
    """An adapted layer with a fused form."""

    module: Any
    factors: Any
    """A of each adapter, by name."""
    weight_of: WeightOf
    fits: Callable[[Any, str], bool]
    """Whether an adapter of this name does nothing that the fused form does not."""
    update: Callable[[Any, str, Tensor, Tensor, Tensor], Tensor]
    """Adds an adapter's update to the base's result, given the input and its state."""

    @classmethod
    def of(cls, module: Any) -> _Adapted | None:
        if isinstance(module, QueryableLinear):
            factors, fits, update = module.queryable_A, _queryable_fits, _add_routed
        elif isinstance(module, LoraLayer) and (
            isinstance(module, LoraLinear) or type(module).__name__ == "Linear4bit"
        ):
            factors, fits, update = module.lora_A, _lora_fits, _add_lora
        else:
            return None
        weight_of = _weight_of(module.base_layer)
        return None if weight_of is None else cls(module, factors, weight_of, fits, update)

    def adapter(self) -> str | None:
        """The only active adapter's name; None where the layer's own forward is to run."""
        if self.module.disable_adapters or self.module.merged:
            return None
        names = [name for name in self.module.active_adapters if name in self.module.scaling]
        return names[0] if len(names) == 1 and self.fits(self.module, names[0]) else None


def _together(layers: Sequence[_Adapted], x: Tensor) -> list[Tensor] | None:
    """The outputs of layers at one input; None unless this is an ordinary training pass of each."""
    if not (torch.is_grad_enabled() and x.device.type in FUSED and x.is_floating_point() and x.dim() > 1):
        return None
    names = [name for layer in layers if (name := layer.adapter()) is not None]
    if len(names) < len(layers):
        return None
    kind = autocast_type(x.device) or x.dtype
    bases = []
    for layer in layers:
        # Last of what is asked: some make it anew.
        weight = layer.weight_of(kind)
        if weight is None or weight.device != x.device:
            return None
        bias = layer.module.base_layer.bias
        bases.append((layer.weight_of, weight, None if bias is None else bias.to(kind)))
    x = x.to(kind)
    remade, kept = marked(x)
    # Detached: gradients go through x alone.
    kept = tuple(tensor.detach() for tensor in kept)
    factors = [layer.factors[name].weight for layer, name in zip(layers, names, strict=True)]
    made = _BasesAndStates.apply(x.flatten(0, -2), bases, remade, *factors, *kept)
    results, states = made[: len(layers)], made[len(layers) :]
    outputs = []
    for layer, name, result, state in zip(layers, names, results, states, strict=True):
        updated = layer.update(layer.module, name, x, result, state.unflatten(0, x.shape[:-1]))
        outputs.append(updated.unflatten(0, x.shape[:-1]))
    return outputs


def low_rank_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """A forward for a layer adapted with plain LoRA or a queryable memory; None for any other layer.

    Calls that are not an ordinary training pass (no gradient, dropout, several adapters, a switched-off or merged one)
    go through the layer's own forward.
    """
    layer = _Adapted.of(module)
    if layer is None:
        return None
    plain = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs = None if args or kwargs else _together([layer], x)
        own: Tensor = plain(x, *args, **kwargs) if outputs is None else outputs[0]
        return own

    return forward


def at_one_input(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """A call of several layers with the same input, which goes through one node where all of them have a fused form."""
    found = [None if "forward" in module.__dict__ else _Adapted.of(module) for module in modules]
    layers = [layer for layer in found if layer is not None]

    def call(x: Tensor) -> Sequence[Tensor]:
        if len(layers) == len(modules) and not any(map(_has_hooks, modules)):
            outputs = _together(layers, x)
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


def _add_lora(layer: Any, name: str, x: Tensor, result: Tensor, state: Tensor) -> Tensor:
    updated: Tensor = _AddLowRank.apply(result, state.flatten(0, -2), layer.lora_B[name].weight, layer.scaling[name])
    return updated


def _queryable_fits(layer: Any, name: str) -> bool:
    return not (layer.dropout[name] and layer.training)


def _add_routed(layer: Any, name: str, x: Tensor, result: Tensor, state: Tensor) -> Tensor:
    routed = layer.routed(name, x, state)
    return add_update(result, state, routed, layer.queryable_B[name].weight, layer.scaling[name])


def _weight_of(base: Any) -> WeightOf | None:
    """Where the frozen weight of a base layer is to be had."""
    if type(base) is nn.Linear and "forward" not in base.__dict__:
        if base.weight.requires_grad or base.weight.device.type not in FUSED:
            return None
        return lambda dtype: base.weight if base.weight.dtype == dtype else None
    if base.weight.device.type in FUSED and is_plain_4bit(base) and "forward" not in base.__dict__:
        return partial(dequantized_weight, base)
    return getattr(base.__dict__.get("forward"), "weight_in", None)
