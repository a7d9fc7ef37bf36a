"""What a run does about its held-out rows: measures them when it is time, keeps the best adapter, stops early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qmemtune.engine.heldout import Abandoned
from qmemtune.engine.parts import Parts
from qmemtune.engine.prior_schedule import PriorSchedule
from qmemtune.engine.rhythm import Due, due_at


class Evaluations:
    """The evaluations of one run. Methods take the step that was made last, and the model, which holds its adapter.

    Args:
        parts: the run.
        prior_schedule: moves the instruction prior to that step.
        log: takes the numbers for the logging back-ends.
    """

    def __init__(self, parts: Parts, prior_schedule: PriorSchedule, log: Callable[[dict[str, float]], None]) -> None:
        self.parts = parts
        self.prior_schedule = prior_schedule
        self.log = log
        self.stopped_early = False
        self.abandoned = False
        """Whether a signal cut an evaluation during training short: it is made up for when the run goes on."""
        self.end_abandoned = False
        """The same of the evaluation after the last step."""
        self.final_step = 0
        """Step whose adapter the model holds at the end."""
        self.final_metrics: dict[str, Any] = {}

    def catch_up(self, step: int, model: nn.Module) -> None:
        """Before the first step: measure the base if that is due; after a resume, what a signal cut short."""
        if step > 0:
            self.measure_due(step, model)
        elif self.parts.config.evaluation.at_start:
            try:
                self._measure_as(0, exact_match=False)
            except Abandoned:
                self.abandoned = True

    def measure_due(self, step: int, model: nn.Module) -> dict[str, Any]:
        """Measure what is due at a step, unless that was done, and see whether the run stops early."""
        metrics: dict[str, Any] = {}
        due = due_at(step, self.parts.config)
        try:
            if due and self.parts.heldout.measured.done_at != step:
                metrics = self._measure(step, due, model)
        except Abandoned:
            self.abandoned = True
        patience = self.parts.config.trainer.early_stopping_patience
        if patience and self.parts.best.evaluations_since >= patience and step < self.parts.steps.total:
            self.stopped_early = True
        return metrics

    def end(self, step: int, model: nn.Module) -> None:
        """After the last step: go back to the best adapter if it is to be kept, and measure what the run ends with."""
        try:
            self._end(step, model)
        except Abandoned:
            # The checkpoint of the last step is saved: resuming only evaluates and writes the adapter.
            self.end_abandoned = True

    def _end(self, step: int, model: nn.Module) -> None:
        config, best, heldout = self.parts.config, self.parts.best, self.parts.heldout
        self._ends_with(step)
        at_end = config.evaluation.at_end and bool(heldout)
        if config.trainer.keep_best and at_end:
            self._measure(step, Due(loss=True, exact_match=False, samples=False), model)
        if best.restore(model) and best.step is not None:
            self._ends_with(best.step)
        if at_end:
            self.final_metrics = self._measure_as(self.final_step, exact_match=config.evaluation.exact_match.enabled)
        else:
            self.final_metrics = heldout.known(self.final_step, exact_match=False) or {}

    def _ends_with(self, step: int) -> None:
        self.final_step = step
        self.prior_schedule.go_to(step)

    def _measure(self, step: int, due: Due, model: nn.Module) -> dict[str, Any]:
        """Measure held-out rows at the current step, log the result and compare its loss to the best one."""
        metrics: dict[str, Any] = {}
        if due.loss or due.exact_match:
            metrics = self._measure_as(step, exact_match=due.exact_match)
            self.parts.best.update(step, metrics["loss"], model)
        # Last: a measurement that a signal cuts short is made again, samples that are written are not.
        if due.samples:
            self.parts.heldout.write_samples(step)
        self.parts.heldout.measured.done_at = step
        return metrics

    def _measure_as(self, step: int, *, exact_match: bool) -> dict[str, Any]:
        """Measure the model, which holds the adapter of ``step``, unless that was done, and log the result."""
        known = self.parts.heldout.known(step, exact_match=exact_match)
        if known is not None:
            return known
        metrics = self.parts.heldout.measure(step, exact_match=exact_match)
        self.log({f"eval_{name}": value for name, value in metrics.items() if isinstance(value, float)})
        line = {"event": "evaluation", "step": step, **metrics}
        self.parts.metrics.write(line)
        self.parts.progress.evaluation(line)
        return metrics
