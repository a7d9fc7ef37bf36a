"""Measures held-out rows during and after training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list

from qmemtune.engine.interrupt import StopRequest
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.task import Task


class Abandoned(Exception):
    """A signal asked to stop while rows were being measured."""


@dataclass
class HeldOut:
    """A task's held-out rows, each thing about them measured once.

    Every process measures all rows, so that none waits at a barrier for longer than its time-out; the first one's
    numbers count.
    """

    task: Task
    samples: JsonLines
    stop: StopRequest
    world_size: int = 1
    measured: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)
    """Results of this process, by step and whether exact match was measured."""

    def __bool__(self) -> bool:
        return len(self.task.heldout) > 0

    def known(self, step: int, *, exact_match: bool) -> dict[str, Any] | None:
        """What was measured at a step before, if it holds what is asked for."""
        return self.measured.get((step, True)) or self.measured.get((step, exact_match))

    def measure(self, step: int, *, exact_match: bool) -> dict[str, Any]:
        """The task's metrics, with exact match if asked, of its model, which holds the adapter of ``step``.

        Raises:
            Abandoned: a signal asked to stop.
        """
        result = self.task.evaluate(exact_match=exact_match, progress=self._go_on)
        if self.world_size > 1:
            box = [result]
            broadcast_object_list(box)
            result = box[0]
        self.measured[step, exact_match] = result
        return result

    def write_samples(self, step: int) -> None:
        """Answer a few held-out rows and append them to samples.jsonl."""
        for sample in self.task.samples():
            self.samples.write({"step": step, **sample})

    def _go_on(self, what: str, done: int, total: int) -> None:
        # One process of several must not leave the others waiting for its numbers.
        if self.stop and self.world_size == 1:
            raise Abandoned(f"{what}: {done} of {total} rows")
