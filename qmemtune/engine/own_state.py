"""What a checkpoint holds besides Trainer's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qmemtune
from qmemtune.data.sampler import ORDER
from qmemtune.disk import onto_disk
from qmemtune.engine import made_with
from qmemtune.engine.metrics_log import count_lines
from qmemtune.engine.parts import Parts
from qmemtune.rundir import RunDir


def save_own_state(parts: Parts, folder: Path, run: RunDir, step: int) -> dict[str, Any]:
    """Write the run's own state into the folder of a checkpoint that is being written.

    Returns:
        Facts for its manifest.
    """
    parts.totals.save(folder)
    parts.best.save(folder)
    made_with.save(parts.made_with, folder)
    parts.heldout.measured.save(folder, {step, parts.best.step})
    logs = [path for path in run.logs if path.exists()]
    for path in logs:
        # A checkpoint must not be on the disk before the lines that it says are there.
        onto_disk(path)
    return {
        "step": step,
        "rows_per_step": parts.steps.rows_per_step,
        "row_order": getattr(parts.sampler, "order", ORDER),
        "log_lines": {path.name: count_lines(path) for path in logs},
        "qmemtune": qmemtune.__version__,
    }
