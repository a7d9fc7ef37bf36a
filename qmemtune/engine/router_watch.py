"""Watches the router of a queryable memory during training: numbers for the logs, and a word when it collapses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qmemtune.adapters.queryable import memory_of
from qmemtune.adapters.queryable.statistics import RouteStatistics, RouteUse, active_adapter
from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.schema import Config
from qmemtune.engine.rhythm import falls_on
from qmemtune.engine.totals import Totals

DIGITS = 5


class RouterWatch:
    """Observes the routes of every ``trainer.route_stats_steps``-th step.

    With another adapter, or a generated core, which has no routes, it does nothing.

    Args:
        model: the adapted model.
        config: the run.
        totals: remember the collapse when the run is interrupted.
    """

    def __init__(self, model: nn.Module, config: Config, totals: Totals) -> None:
        memory = memory_of(model)
        routed = isinstance(config.adapter, QueryableConfig) and not config.adapter.generated_core
        self.memory = memory if routed else None
        self.config = config
        self._statistics: RouteStatistics | None = None
        self.totals = totals

    def begin(self, step: int) -> None:
        """Before the forward passes of a step: observe them if the step is due."""
        if self.memory is not None and falls_on(step, self.config.trainer.route_stats_steps):
            self._statistics = RouteStatistics(active_adapter(self.memory))
            self.memory.observer = self._statistics

    def end(self, device: torch.device, add_up: Callable[[Tensor], Tensor]) -> RouteUse | None:
        """After the step: the use of the atoms by its real tokens in all processes; None where it was not due.

        Args:
            device: where processes add up.
            add_up: adds a tensor up over processes.
        """
        if self._statistics is None or self.memory is None:
            return None
        self.memory.observer = None
        statistics, self._statistics = self._statistics, None
        return statistics.use(add_up(statistics.table(device)))

    def warning(self, step: int, use: RouteUse) -> str | None:
        """What to say about a collapsed router, the first time one is seen."""
        assert isinstance(self.config.adapter, QueryableConfig)
        problem = use.collapse(self.config.adapter.top_k)
        if problem is None or self.totals.router_collapsed_at_step is not None:
            return None
        self.totals.router_collapsed_at_step = step
        return f"warning: step {step}: {problem} -> {remedy(self.config)}"


def remedy(config: Config) -> str:
    """What to change so that the router of a run does not collapse."""
    adapter = config.adapter
    assert isinstance(adapter, QueryableConfig)
    ways = [
        f"lower adapter.memory_learning_rate_multiplier (now {adapter.memory_learning_rate_multiplier:g})",
        f"adapter.temperature (now {adapter.temperature:g})",
    ]
    off = [f"adapter.{name}=true" for name in ("router_norm", "center_queries") if not getattr(adapter, name)]
    if off:
        ways.insert(0, f"set {' and '.join(off)}")
    if adapter.instruction_prior:
        ways.append(f"adapter.instruction_prior (now {adapter.instruction_prior:g})")
    few = f", or take fewer atoms (adapter.num_atoms, now {adapter.num_atoms}) where all rows are of one kind"
    return " or ".join([", ".join(ways[:-1]), ways[-1]]) + few


def logged(use: RouteUse) -> dict[str, Any]:
    """For metrics.jsonl: lists by block, and the dead atoms by number."""
    return {
        "entropy": rounded(use.entropy),
        "effective_atoms": rounded(use.effective_atoms),
        "dead_atoms": use.dead_atoms,
        "use": [rounded(block) for block in use.use],
        "tokens": use.tokens,
    }


def scalars(use: RouteUse) -> dict[str, float]:
    """For logging back-ends: single numbers, each block's entropy among them."""
    blocks = len(use.use)
    return {
        "router_entropy": sum(use.entropy) / blocks,
        "router_effective_atoms": sum(use.effective_atoms) / blocks,
        "router_dead_atoms": float(len(use.dead_atoms)),
        **{f"router_entropy_block_{block}": value for block, value in enumerate(use.entropy)},
    }


def rounded(values: list[float]) -> list[float]:
    """A few digits are enough in a log."""
    return [round(value, DIGITS) for value in values]
