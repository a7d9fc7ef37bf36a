"""What a trainer works with besides its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from qmemtune.config.schema import Config
from qmemtune.data.changes import WatchedFiles
from qmemtune.engine.bad_steps import BadSteps
from qmemtune.engine.best import Best
from qmemtune.engine.heldout import HeldOut
from qmemtune.engine.interrupt import StopRequest
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.progress import Progress
from qmemtune.engine.steps import StepCount
from qmemtune.engine.task import Task
from qmemtune.engine.totals import Totals
from qmemtune.engine.unwritten import Unwritten


@dataclass
class Parts:
    """The run's config and all that belongs to it, put together once."""

    config: Config
    sampler: Sampler[int]
    task: Task
    heldout: HeldOut
    steps: StepCount
    metrics: JsonLines
    progress: Progress
    stop: StopRequest
    totals: Totals
    best: Best
    until: int | None
    """Optimizer step after which this process stops, although the run goes on; None: at its end."""
    made_with: dict[str, Any]
    """See :mod:`qmemtune.engine.made_with`."""
    bad_steps: BadSteps
    unwritten: Unwritten
    files: WatchedFiles
