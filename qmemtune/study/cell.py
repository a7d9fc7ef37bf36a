"""Runs one cell: an ordinary training run, and its numbers in one result."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from typing import Any

from qmemtune.config.compose import Composed
from qmemtune.config.schema import Config, ResumeConfig
from qmemtune.engine.checkpoints import newest_complete
from qmemtune.engine.made_with import ChangedRun
from qmemtune.engine.run import train
from qmemtune.engine.shared import Loads
from qmemtune.errors import Diverged
from qmemtune.rundir import RunDir
from qmemtune.study.cells import Cell, decisive, is_run_of
from qmemtune.study.folder import StudyDir

STARTED = "cell.json"
"""File of a run folder that says which cell it is of."""
KEPT = ("trainable_parameters", "adapter_kind", "steps", "train_loss", "step_s_median", "tokens_per_s", "peak_rss_mib")
"""What of a run's summary is kept in a result."""


def run_cell(cell: Cell, folder: StudyDir, loads: Loads) -> dict[str, Any]:
    """Run a cell, or finish it if it was interrupted, and write its result.

    Raises:
        UserError: the run cannot be made.
        Interrupted: a signal stopped it; it goes on from its checkpoint when the study is started again.
    """
    run = folder.run(cell)
    begun = time.perf_counter()
    config = dataclasses.replace(cell.config, run_dir=str(run.path))
    result: dict[str, Any] = {
        "cell": cell.name,
        "setting": cell.setting,
        "variant": cell.variant,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "digest": cell.digest,
        "config": decisive(cell.config),
        "diverged": False,
    }
    try:
        summary = train_cell(cell, config, run, loads)
    except Diverged:
        result |= {"diverged": True, "metrics": {}}
    else:
        result["metrics"] = {k: v for k, v in summary["eval"].items() if k not in ("seconds", "perplexity")}
        result |= {name: summary[name] for name in KEPT}
    result["base_loss"] = loss_before(run)
    result["seconds"] = round(time.perf_counter() - begun, 2)
    # States of optimizers, several times the adapter: nothing goes on from them any more.
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    folder.write_result(cell, result)
    # A trainer and its model refer to each other; the next run must not start beside them.
    gc.collect()
    return result


def train_cell(cell: Cell, config: Config, run: RunDir, loads: Loads) -> dict[str, Any]:
    """Go on with an interrupted cell; start anew where it would not end as it began (with other packages, say)."""
    config.resume = ResumeConfig("auto" if goes_on(run, cell) else None)
    try:
        return train(Composed(config, {}, config.recipe), loads=loads)
    except ChangedRun:
        clear(run, cell)
        config.resume = ResumeConfig()
        return train(Composed(config, {}, config.recipe), loads=loads)


def goes_on(run: RunDir, cell: Cell) -> bool:
    """Whether an interrupted run of this very cell can go on; whatever else lies in its folder is removed."""
    started = run.path / STARTED
    same = started.is_file() and is_run_of(json.loads(started.read_text(encoding="utf-8")), cell.config)
    if same and newest_complete(run.checkpoints)[0]:
        return True
    clear(run, cell)
    return False


def clear(run: RunDir, cell: Cell) -> None:
    """An empty folder that is this cell's."""
    shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True)
    (run.path / STARTED).write_text(json.dumps(decisive(cell.config)), encoding="utf-8")


def loss_before(run: RunDir) -> float | None:
    """The held-out loss before the first step: that of the base."""
    if not run.metrics.is_file():
        return None
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("event") == "evaluation" and event.get("step") == 0:
            loss: float | None = event["loss"]
            return loss
    return None
