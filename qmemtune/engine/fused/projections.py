"""Queries, keys and values, which an attention layer asks of one input one after the other, from one node.

As one node they have one low-rank product, and the gradients of their input are added by the products that make them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qmemtune.engine.fused.low_rank import Adapted, together

NAMES = ("q_proj", "k_proj", "v_proj")
CALL = re.compile(r"self\.(q_proj|k_proj|v_proj)\((\w*)(\))?")
"""A call of one of them in a layer's code; its argument, and what closes it where that is a variable."""


class Projections:
    """Adapted projections of one attention layer: the call of the first makes the outputs of all.

    One that is given another input than the first is computed alone. What happens depends on the pass alone, so that a
    recomputed pass does the same.

    Args:
        attention: the layer.
        layers: in the order in which it calls them.
    """

    def __init__(self, attention: nn.Module, layers: Sequence[Adapted]) -> None:
        self._layers = layers
        self._made: tuple[Tensor, dict[int, Tensor]] | None = None
        self._hook: RemovableHandle = attention.register_forward_hook(self._forget, always_call=True)
        self.modules: list[nn.Module] = [layer.module for layer in layers]
        for place, module in enumerate(self.modules):
            module.forward = self._forward(place, module.forward)

    def remove(self) -> None:
        """Give the projections their own forwards back."""
        self._hook.remove()
        for module in self.modules:
            del module.forward

    def _forward(self, place: int, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = None if args or kwargs else self._output(place, x)
            return plain(x, *args, **kwargs) if output is None else output

        return forward

    def _output(self, place: int, x: Tensor) -> Tensor | None:
        """A projection's output; None where its own forward is to run."""
        if place == 0:
            outputs = together(self._layers, x)
            self._made = None if outputs is None else (x, dict(enumerate(outputs)))
        if self._made is not None and self._made[0] is x and place in self._made[1]:
            return self._made[1].pop(place)
        outputs = together([self._layers[place]], x)
        return None if outputs is None else outputs[0]

    def _forget(self, *_: Any) -> None:
        # Whatever the layer did not ask for, or had no time to ask for, would hold the pass's graph.
        self._made = None


def fused_projections(module: nn.Module) -> Projections | None:
    """Takes over those projections of an attention layer that are adapted; None for any other layer."""
    parts = [getattr(module, name, None) for name in NAMES]
    layers = [layer for part in parts if part is not None and (layer := Adapted.of(part)) is not None]
    if len(layers) < 2 or not asks_one_input(type(module).forward):
        return None
    if any("forward" in layer.module.__dict__ for layer in layers) or len({layer.inputs for layer in layers}) > 1:
        return None
    return Projections(module, layers)


@lru_cache(maxsize=64)
def asks_one_input(forward: Callable[..., Any]) -> bool:
    """Whether a layer's code calls each projection once, in their order, with the same variable."""
    try:
        calls = CALL.findall(inspect.getsource(forward))
    except (OSError, TypeError):
        return False
    one = len({argument for _, argument, _ in calls}) == 1 and all(closed for _, _, closed in calls)
    return one and tuple(name for name, _, _ in calls) == NAMES
