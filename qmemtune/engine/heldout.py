"""Measures held-out rows during and after training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from qmemtune.engine.interrupt import StopRequest
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.task import Task


class Abandoned(Exception):
    """A signal asked to stop while rows were being measured."""


FILE = "measured.json"


@dataclass
class Measured:
    """What has been measured. Saved with each checkpoint, so that a resumed run measures and logs nothing twice."""

    results: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)
    """By step and whether exact match was measured."""
    done_at: int | None = None
    """Latest step at which all that was due was measured."""

    def save(self, folder: Path, steps: set[int | None]) -> None:
        """Write into a checkpoint folder the results of some steps."""
        kept = [[step, exact, result] for (step, exact), result in self.results.items() if step in steps]
        (folder / FILE).write_text(json.dumps({"done_at": self.done_at, "results": kept}), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, otherwise: int | None) -> Measured:
        """Read from a checkpoint folder.

        Args:
            folder: the checkpoint.
            otherwise: ``done_at`` where an earlier version wrote the checkpoint, without this file.
        """
        if not (folder / FILE).is_file():
            return cls(done_at=otherwise)
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls({(step, exact): result for step, exact, result in stored["results"]}, stored["done_at"])


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
    measured: Measured = field(default_factory=Measured)

    def __bool__(self) -> bool:
        return len(self.task.heldout) > 0

    def known(self, step: int, *, exact_match: bool) -> dict[str, Any] | None:
        """What was measured at a step before, if it holds what is asked for."""
        return self.measured.results.get((step, True)) or self.measured.results.get((step, exact_match))

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
        self.measured.results[step, exact_match] = result
        return result

    def write_samples(self, step: int) -> None:
        """Answer a few held-out rows and append them to samples.jsonl."""
        for sample in self.task.samples():
            self.samples.write({"step": step, **sample})

    def _go_on(self, what: str, done: int, total: int) -> None:
        # One process of several must not leave the others waiting for its numbers.
        if self.stop and self.world_size == 1:
            raise Abandoned(f"{what}: {done} of {total} rows")
