"""Measures held-out rows during and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from qmemtune.config.schema import EvaluationConfig
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.evaluation.evaluate import evaluate
from qmemtune.evaluation.samples import sample_answers


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
    dtype: torch.dtype
    samples: JsonLines
    world_size: int = 1
    measured: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)
    """Results of this process, by step and whether exact match was measured."""

    def __bool__(self) -> bool:
        return len(self.rows) > 0

    def measure(self, model: Any, step: int, *, exact_match: bool) -> dict[str, Any]:
        """Loss, perplexity and, if asked, exact match; a step measured before is not measured again."""
        for known in ((step, True), (step, exact_match)):
            if known in self.measured:
                return self.measured[known]
        result = evaluate(
            model, self.tokenizer, self.rows, self.config, self.source, self.dtype, exact_match=exact_match
        ).as_dict()
        if self.world_size > 1:
            box = [result]
            broadcast_object_list(box)
            result = box[0]
        self.measured[step, exact_match] = result
        return result

    def write_samples(self, model: Any, step: int) -> None:
        """Answer a few held-out rows and append them to samples.jsonl."""
        for sample in sample_answers(model, self.tokenizer, self.rows, self.config.samples, self.source, self.dtype):
            self.samples.write({"step": step, **sample})
