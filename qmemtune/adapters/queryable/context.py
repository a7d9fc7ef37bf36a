"""What belongs to one forward pass: its routes, the states of its blocks, and its instructions.

A context is tied to its forward pass, never to a thread and never to "the latest": two passes may run before one
backward, and with gradient checkpointing a backward, which may run in another thread, computes parts of its own pass
again. See :class:`BoundCheckpoint`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qmemtune.adapters.queryable.fixed import Group, Kept


@dataclass
class AdapterPass:
    """The state of one adapter in one forward pass. ``...`` are the leading dimensions of the layer's input."""

    routed: dict[int, Tensor] = field(default_factory=dict)
    """Block -> routed operator ``C = I + sum_m w_m Delta_m``, (..., R, R), float32."""
    cast: dict[int, Tensor] = field(default_factory=dict)
    """Block -> the same in the layers' data type, for passes without gradients."""
    owners: dict[int, int] = field(default_factory=dict)
    """Block -> id of the layer that formed its route."""
    states: list[Tensor] = field(default_factory=list)
    """Summary states ``W_s h_j`` of the blocks in the order in which they ran, (..., K)."""
    earlier: dict[int, int] = field(default_factory=dict)
    """Block -> how many of ``states`` its route may read: those of blocks that ran before it."""
    stacked: Tensor | None = None
    """``states`` as one tensor (..., J, K), in passes without gradients."""
    kept: Kept = field(default_factory=dict)
    """What passes without gradients make of weights once a pass."""
    divergences: list[Tensor] = field(default_factory=list)
    """One mean KL(route without prior || prior) a block, scalars."""


@dataclass
class ForwardContext:
    """One forward pass of a model."""

    passes: dict[str, AdapterPass] = field(default_factory=dict)
    """Adapter name -> its state."""
    token_mask: Tensor | None = None
    """1 for real tokens, 0 for padding, (B, T); None if the caller gave none."""
    instruction: Tensor | Mapping[str, Tensor] | None = None
    """Unit-norm instruction embeddings of the rows, (B, E), zeros for none, perhaps by adapter; kept for
    recomputation."""
    instruction_rows: Tensor | None = None
    """Of packed rows: which of the instructions each token has, (B, T)."""
    prompt_mask: Tensor | None = None
    """True for the tokens of each row's prompt, (B, T); for routes of whole rows only."""
    entries: set[int] = field(default_factory=set)
    """Ids of the modules through which the pass has entered."""


class ContextHolder(threading.local):
    """The context that is current on a model in this thread, and whether a checkpointed part is being computed again.

    Each thread has its own, so that one model can answer in several threads. A backward pass in another thread finds
    its context through :meth:`bind`.
    """

    def __init__(self) -> None:
        self.current: ForwardContext | None = None
        self.recomputing = False
        self.kept: Kept | None = None
        """What is kept while weights are fixed; None while they may change."""
        self.group: Group | None = None
        """Of the layers that read one input, those that ran last; while weights are fixed."""
        self.open: list[nn.Module] = []
        """Entries of the running forward pass, outermost first."""

    def __reduce__(self) -> tuple[type[ContextHolder], tuple[()]]:
        # A copied or stored model is in no forward pass.
        return ContextHolder, ()

    def enter(
        self,
        entry: nn.Module,
        token_mask: Tensor | None,
        instruction: Tensor | Mapping[str, Tensor] | None,
        instruction_rows: Tensor | None = None,
        prompt_mask: Tensor | None = None,
    ) -> bool:
        """A forward pass enters through ``entry``; returns whether this opened a context."""
        if entry in self.open:
            # A KeyboardInterrupt skips the hooks that close: what is still open belongs to a pass that was cut off.
            del self.open[self.open.index(entry) :]
        nested = bool(self.open)
        self.open.append(entry)
        context = self.current
        if nested and context is not None and id(entry) not in context.entries:
            context.entries.add(id(entry))
            if context.token_mask is None:
                context.token_mask = token_mask
            return False
        # A decoder that its model calls twice runs two passes.
        self.current = ForwardContext(
            token_mask=token_mask,
            instruction=instruction,
            instruction_rows=instruction_rows,
            prompt_mask=prompt_mask,
            entries={id(entry)},
        )
        self.recomputing = False
        return True

    def leave(self, entry: nn.Module) -> ForwardContext | None:
        """The pass leaves ``entry``; returns the context if that closed it."""
        if entry not in self.open:
            return None
        del self.open[self.open.index(entry) :]
        if self.open:
            return None
        context, self.current = self.current, None
        return context

    def pass_of(self, name: str) -> AdapterPass:
        """The state of adapter ``name`` in the current forward pass; made on first use.

        Raises:
            RuntimeError: no forward pass is open.
        """
        if self.current is None:
            raise RuntimeError(
                "a layer with a queryable memory was called outside its model's forward pass, or recomputed by a "
                "checkpoint function that is not the model's own: call the model, and switch checkpointing on with "
                "model.gradient_checkpointing_enable({'use_reentrant': False})"
            )
        state = self.current.passes.get(name)
        if state is None:
            state = self.current.passes[name] = AdapterPass()
        return state

    @contextmanager
    def entered(self, context: ForwardContext | None, recomputing: bool) -> Iterator[None]:
        """Make ``context`` current for a while."""
        saved = self.current, self.recomputing
        self.current, self.recomputing = context, recomputing
        try:
            yield
        finally:
            self.current, self.recomputing = saved

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` tied to the pass that is current now: its first call is the forward, later ones recompute."""
        context, calls = self.current, 0

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            with self.entered(context, recomputing=calls > 1):
                return function(*args, **kwargs)

        return bound


class BoundCheckpoint:
    """A checkpoint function whose recomputation sees the context of its own forward pass.

    Args:
        function: what transformers calls for a checkpointed layer, ``function(layer_forward, *args)``.
        holder: the model's context holder.

    Raises:
        ValueError: ``function`` is the reentrant variant. It runs the layer without gradients first, so the route
            formed there would never receive any.
    """

    def __init__(self, function: Callable[..., Any], holder: ContextHolder) -> None:
        # Where nothing is said, torch takes the reentrant variant.
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "reentrant gradient checkpointing gives wrong router gradients: "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.function = function
        self.holder = holder

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(self.holder.bind(function), *args, **kwargs)
