"""How many optimizer steps a run has."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qmemtune.config.training import OptimizerConfig, TrainerConfig


@dataclass(frozen=True)
class StepCount:
    """Optimizer steps of a run."""

    per_epoch: int
    """In one pass over the training rows; the last one may hold fewer rows."""
    total: int
    """In the whole run."""
    warmup: int
    """Of them with rising learning rate."""
    rows_per_step: int
    """Rows in one step, over all processes."""


def count_steps(rows: int, trainer: TrainerConfig, optimizer: OptimizerConfig, *, world_size: int = 1) -> StepCount:
    """Count the steps of a run over ``rows`` training rows in ``world_size`` processes.

    Every process gets as many batches as the others: the last ones are filled up with rows from the beginning.
    """
    accumulation = trainer.gradient_accumulation_steps
    batches = math.ceil(math.ceil(rows / trainer.per_device_train_batch_size) / world_size)
    per_epoch = max(math.ceil(batches / accumulation), 1)
    total = trainer.max_steps or math.ceil(trainer.num_train_epochs * per_epoch)
    given = optimizer.warmup_steps
    warmup = int(given) if given >= 1 else math.ceil(total * given)
    rows_per_step = trainer.per_device_train_batch_size * accumulation * world_size
    return StepCount(per_epoch, total, warmup, rows_per_step)
