"""Measures held-out rows during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from qmemtune.config.schema import EvaluationConfig
from qmemtune.engine.interrupt import StopRequest
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.evaluation.evaluate import draw_samples, evaluate


class Abandoned(Exception):
    """A signal asked to stop while rows were being measured."""


@dataclass
class HeldOut:
    """Held-out rows and how to measure them.

    Every process measures all rows, so that none waits at a barrier for longer than its time-out; the first one's
    numbers count.
    """

    rows: Sequence[Any]
    tokenizer: Any
    config: EvaluationConfig
    source: Any
    """The adapter's instruction source."""
    device: torch.device
    dtype: torch.dtype
    samples: JsonLines
    stop: StopRequest
    world_size: int = 1
    measured: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)
    """Results of this process, by step and whether exact match was measured."""

    def __bool__(self) -> bool:
        return len(self.rows) > 0

    def known(self, step: int, *, exact_match: bool) -> dict[str, Any] | None:
        """What was measured at a step before, if it holds what is asked for."""
        return self.measured.get((step, True)) or self.measured.get((step, exact_match))

    def measure(self, model: Any, step: int, *, exact_match: bool) -> dict[str, Any]:
        """Loss, perplexity and, if asked, exact match of the model, which holds the adapter of ``step``.

        Raises:
            Abandoned: a signal asked to stop.
        """
        result = evaluate(
            model,
            self.tokenizer,
            self.rows,
            self.config,
            source=self.source,
            device=self.device,
            dtype=self.dtype,
            exact_match=exact_match,
            progress=self._go_on,
        ).as_dict()
        if self.world_size > 1:
            box = [result]
            broadcast_object_list(box)
            result = box[0]
        self.measured[step, exact_match] = result
        return result

    def write_samples(self, model: Any, step: int) -> None:
        """Answer a few held-out rows and append them to samples.jsonl."""
        answered = draw_samples(
            model, self.tokenizer, self.rows, self.config, source=self.source, device=self.device, dtype=self.dtype
        )
        for sample in answered:
            self.samples.write({"step": step, **sample.as_dict()})

    def _go_on(self, what: str, done: int, total: int) -> None:
        # One process of several must not leave the others waiting for its numbers.
        if self.stop and self.world_size == 1:
            raise Abandoned(f"{what}: {done} of {total} rows")
