"""Moves the instruction prior's weight, temperature and loss weight along their schedule."""

from __future__ import annotations

from torch import nn

from qmemtune.adapters.queryable import memory_of
from qmemtune.adapters.queryable.statistics import active_adapter
from qmemtune.config.adapters import AdapterConfig, QueryableConfig

SCHEDULED = {
    "instruction_prior": "current_prior",
    "prior_temperature": "current_prior_temperature",
    "prior_kl": "current_prior_kl",
}
"""Option -> the property of the adapter's config that gives its present value."""


class PriorSchedule:
    """Where the prior stands is a function of the step alone, and is saved with the adapter.

    Args:
        model: the adapted model.
        adapter: the run's adapter options.
        total_steps: optimizer steps of the run.
    """

    def __init__(self, model: nn.Module, adapter: AdapterConfig, total_steps: int) -> None:
        self.moving = [name for name in SCHEDULED if getattr(adapter, f"{name}_final", None) is not None]
        self._config = None
        if self.moving and isinstance(adapter, QueryableConfig):
            memory = memory_of(model)
            assert memory is not None
            self._config = memory.configs[active_adapter(memory)]
            self._steps = adapter.prior_schedule_share * total_steps

    def go_to(self, step: int) -> None:
        """Set the values that hold after ``step`` optimizer steps."""
        if self._config is not None:
            self._config.prior_progress = min(1.0, step / self._steps)

    def values(self) -> dict[str, float]:
        """The present values of what moves, for the log."""
        return {name: getattr(self._config, SCHEDULED[name]) for name in self.moving}
