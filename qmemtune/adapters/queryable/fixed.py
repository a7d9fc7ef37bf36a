"""What follows from an adapter's weights alone, made once where the weights stay as they are.

A decoded token costs calls, not arithmetic, so here are as few of them as can be. What a route needs of the weights is
made once a pass, or, with :class:`FixedWeights`, once; and then layers that read the same input (query, key and value;
gate and up) have their low-rank states from one product, and pass them through the routed operator in a second one.

Tensor letters: D input width, R rank, O output features, G layers of a group, T tokens; ``...`` are an input's tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qmemtune.adapters.queryable.layer import QueryableLinear


FIXED = "_qmemtune_fixed"
"""Marks the forwards that are made here."""

_CHANGING = threading.Lock()
"""Held where threads change what they share: the forwards of layers, and who belongs to a group."""


Kept = dict[Any, Tensor]
"""Tensors made of weights, by what they are; a plain dictionary, which ``torch.compile`` follows."""


def once(kept: Kept, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` returned at the first call with this key."""
    found = kept.get(key)
    if found is None:
        found = kept[key] = make()
    return found


def fixed_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Decode faster: while open, in this thread, the weights of the model's queryable memory must not change.

    Only passes without gradients differ, and those in rounding only. A model without queryable memory stays as it is.

    Example:
        >>> with torch.no_grad(), fixed_weights(model):
        ...     model.generate(**inputs)
    """
    return FixedWeights(model).held()


class FixedWeights:
    """The same, to be opened several times: for a caller that may not leave it open in between.

    Args:
        model: any.
    """

    def __init__(self, model: nn.Module) -> None:
        from qmemtune.adapters.queryable.layer import QueryableLinear
        from qmemtune.adapters.queryable.memory import memory_of

        self._memory = memory_of(model)
        self._kept: Kept = {}
        layers = [module for module in model.modules() if isinstance(module, QueryableLinear)]
        self._forwards = [(layer, made) for layer in layers if (made := fixed_forward(layer)) is not None]

    @contextmanager
    def held(self) -> Iterator[None]:
        """While open, weights must not change; nor may they between two times."""
        if self._memory is None:
            yield
            return
        holder = self._memory.holder
        before = holder.kept
        with _CHANGING:
            # Nested, or in another thread at the same time: the one that was first stays, and is the one to go.
            mine = [(layer, made) for layer, made in self._forwards if not hasattr(layer.forward, FIXED)]
            own = [layer.__dict__.get("forward") for layer, _ in mine]
            for layer, made in mine:
                layer.forward = made
        holder.kept = self._kept if before is None else before
        try:
            yield
        finally:
            holder.kept = before
            if holder.group is not None:
                holder.group.forget()
                holder.group = None
            with _CHANGING:
                for (layer, _), forward in zip(mine, own, strict=True):
                    if forward is None:
                        del layer.forward
                    else:
                        layer.forward = forward


class Group:
    """Layers of one block that read the same input.

    Args:
        first: the one that runs first.
        name: the adapter.
    """

    def __init__(self, first: QueryableLinear, name: str) -> None:
        self.members = [first]
        self.name = name
        weight = first.queryable_A[name].weight
        self._kind: torch.dtype = weight.dtype
        self._device: str = weight.device.type
        self._factors: dict[tuple[torch.dtype, int], Tensor] = {}
        # In one tuple: threads may share a group, and each takes only what was made for its own input and pass.
        self._made: tuple[Tensor, Any, Sequence[Tensor]] | None = None

    def add(self, layer: QueryableLinear) -> int:
        """Make this layer's states with the others' from now on; returns its place."""
        with _CHANGING:
            if layer not in self.members:
                self.members.append(layer)
            return self.members.index(layer)

    def made_for(self, x: Tensor, context: Any) -> Sequence[Tensor] | None:
        """The states that were made last, if for this input of this pass."""
        made = self._made
        return made[2] if made is not None and made[0] is x and made[1] is context else None

    def takes(self, layer: QueryableLinear, name: str) -> bool:
        """Whether a layer has its route from the same block of the same adapter."""
        return self.name == name and self.members[0].block[name] == layer.block[name]

    def forget(self) -> None:
        """Let go of the last input: that of a long prompt is large."""
        self._made = None

    def state(self, place: int, x: Tensor, context: Any) -> Tensor:
        """``C A x`` of the member in this place, (T, R).

        Args:
            x: input, (..., D).
            context: its forward pass.
        """
        states = self.made_for(x, context)
        # Those that were made before this member joined lack its own.
        if states is None or len(states) <= place:
            states = self._make(x)
            self._made = x, context, states
        return states[place]

    def _make(self, x: Tensor) -> Sequence[Tensor]:
        # As they are now: another thread may add one meanwhile.
        members = tuple(self.members)
        first, count = members[0], len(members)
        kind = torch.get_autocast_dtype(self._device) if torch.is_autocast_enabled(self._device) else self._kind
        factors = self._factors.get((kind, count))
        if factors is None:
            factors = torch.cat([member.queryable_A[self.name].weight.detach().to(kind) for member in members]).t()
            self._factors = {(kind, count): factors}
        # Two dimensions, and no operators: what finds out shapes costs as much as the product of one token.
        rows = x.reshape(-1, x.shape[-1])
        states = torch.mm(rows if rows.dtype == kind else rows.to(kind), factors)
        tokens, rank = states.shape[0], states.shape[1] // count
        own = states if count == 1 else states[:, :rank]
        routed = first.routed(self.name, x, own if x.dim() == 2 else own.view(*x.shape[:-1], rank))
        if tokens == 1:
            made = torch.mm(states.view(count, rank), routed.view(rank, rank).t())
            return (made,) if count == 1 else made.split(1)
        made = torch.bmm(states.view(tokens, count, rank), routed.reshape(tokens, rank, rank).transpose(1, 2))
        return made.unbind(1)


def fixed_forward(layer: QueryableLinear) -> Callable[..., Tensor] | None:
    """A forward for passes without gradient with the adapter that is active now; others go through the layer's own.

    Returns None where more than one adapter is active.
    """
    active = list(layer.active_adapters)
    if len(active) != 1 or active[0] not in layer.queryable_A:
        return None
    name = active[0]
    base, holder, plain = layer.base_layer, layer.memory.holder, layer.forward
    factor, scaling, dropout = layer.queryable_B[name].weight, layer.scaling[name], layer.dropout[name]
    factors: dict[torch.dtype, Tensor] = {}
    # One tuple, which other threads find as it was or as it is, never half of each.
    home = Group(layer, name), 0

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal home
        other = args or kwargs or layer._disable_adapters or layer.active_adapters != active
        if other or torch.is_grad_enabled() or (dropout and layer.training):
            own: Tensor = plain(x, *args, **kwargs)
            return own
        result: Tensor = base(x)
        context, last = holder.current, holder.group
        group, place = home
        if last is not group:
            if last is not None and last.made_for(x, context) is not None and last.takes(layer, name):
                home = group, place = last, last.add(layer)
            elif last is not None:
                last.forget()
            holder.group = group
        state = group.state(place, x, context)
        cast = factors.get(state.dtype)
        if cast is None:
            cast = factors[state.dtype] = factor.detach().to(state.dtype).t()
        if result.dtype == state.dtype and result.is_contiguous():
            result.view(-1, result.shape[-1]).addmm_(state, cast, alpha=scaling)
            return result
        return result.add_((state @ cast).view(result.shape), alpha=scaling)

    setattr(forward, FIXED, True)
    return forward
