"""Queries, keys and values, which an attention layer asks of one input one after the other, from one node.

As one node they have one low-rank product, and the gradients of their input are added by the products that make them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from qmemtune.engine.fused.low_rank import Adapted, together

NAMES = ("q_proj", "k_proj", "v_proj")


class _Shared:
    """Layers of one input: the call of the first makes the outputs of all.

    A model that gives one of them another input is found out at its call, and has a node a layer from then on.
    """

    def __init__(self, layers: Sequence[Adapted]) -> None:
        self.layers = layers
        self._apart = False
        self._made: tuple[Tensor, dict[int, Tensor]] | None = None

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """A layer's output for its input; None where its own forward is to run."""
        if self._apart:
            return self._alone(place, x)
        if place == 0:
            outputs = together(self.layers, x)
            if outputs is None:
                self._made = None
                return self._alone(place, x)
            self._made = x, dict(enumerate(outputs))
        made = self._made
        if made is None or made[0] is not x or place not in made[1]:
            # Without outputs of all, each is alone in this pass only.
            self._apart = made is not None
            self._made = None
            return self._alone(place, x)
        output = made[1].pop(place)
        if not made[1]:
            self._made = None
        return output

    def _alone(self, place: int, x: Tensor) -> Tensor | None:
        outputs = together([self.layers[place]], x)
        return None if outputs is None else outputs[0]


def projection_forwards(module: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Forwards for those projections of an attention layer that are adapted; empty for any other layer.

    Where queries read another input than keys and values, as cross-attention does, that is another layer.
    """
    parts = [getattr(module, name, None) for name in NAMES]
    layers = [layer for part in parts if part is not None and (layer := Adapted.of(part)) is not None]
    if len(layers) < 2 or "Cross" in type(module).__name__:
        return {}
    if any("forward" in layer.module.__dict__ for layer in layers) or len({layer.inputs for layer in layers}) > 1:
        return {}
    shared = _Shared(layers)

    def forward_of(place: int, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = None if args or kwargs else shared.output(place, x)
            return plain(x, *args, **kwargs) if output is None else output

        return forward

    return {layer.module: forward_of(place, layer.module.forward) for place, layer in enumerate(layers)}
