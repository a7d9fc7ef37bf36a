"""Runs a study: its plan, the cells that are not done yet, and what is made of all results."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qmemtune.config.schema import Config
from qmemtune.engine.environment import processor_name, version_of
from qmemtune.engine.interrupt import Interrupted, listening
from qmemtune.engine.plan import adapter_facts
from qmemtune.engine.shared import Loads
from qmemtune.errors import RunFailed
from qmemtune.quiet import as_here, hide_loading_bars
from qmemtune.study.analysis import analyse
from qmemtune.study.cell import run_cell
from qmemtune.study.cells import Cell, Plan, make_plan
from qmemtune.study.folder import StudyDir
from qmemtune.study.options import FOLDERS, Request
from qmemtune.study.studies import find_study
from qmemtune.study.worker import start_worker

Say = Callable[[str], None]
POLL_SECONDS = 1.0
STOPPED = "the study was stopped"
GO_ON = "give the same command again: finished cells are kept, the others go on"
VERSIONS = ("qmemtune", "torch", "transformers", "peft", "bitsandbytes")


def plan_study(name: str, request: Request) -> tuple[Plan, StudyDir]:
    """Compose all cells of a study.

    Raises:
        UserError: there is no such study, or something on the command line is wrong.
    """
    study = find_study(name, request.options)
    plan = make_plan(study, request, trainable_parameters)
    return plan, StudyDir(request.folder or FOLDERS / study.stem)


def trainable_parameters(config: Config) -> int:
    """Of the adapter that a config describes."""
    count: int = adapter_facts(config)[1]["trainable_parameters"]
    return count


def run_study(plan: Plan, folder: StudyDir, *, jobs: int, tuning_seeds: Sequence[int], say: Say) -> dict[str, Any]:
    """Run what is not done, and analyse all of it.

    Args:
        plan: the cells.
        folder: where results are, and where new ones go.
        jobs: processes that run cells side by side.
        tuning_seeds: seeds on which settings were chosen.
        say: is told about each cell.

    Returns:
        What study.json holds.

    Raises:
        UserError: a cell cannot be run.
        Interrupted: a signal stopped the study; the same command goes on.
    """
    todo = folder.unfinished(plan.cells)
    say(f"{len(plan.cells)} cells, {len(plan.cells) - len(todo)} done already; results in {folder.path}")
    told = Told(len(todo), say)
    if jobs == 1:
        loads = Loads(keep=len(todo) > 1)
        for cell in todo:
            try:
                told(run_cell(cell, folder, loads))
            except Interrupted as stopped:
                raise Interrupted(STOPPED, where=cell.name, fix=GO_ON, signum=stopped.exit_code - 128) from None
    elif todo:
        run_side_by_side(todo, folder, jobs, told)
    results = [found for cell in plan.cells if (found := folder.finished(cell)) is not None]
    return {
        "study": plan.study.name,
        "command": plan.command,
        "title": plan.study.title,
        "about": plan.study.about,
        "recipe": plan.study.recipe,
        "machine": {"processor": processor_name(), "cpu_count": os.cpu_count(), "jobs": jobs},
        "versions": {name: version_of(name) for name in VERSIONS},
        **analyse(plan, results, tuning_seeds),
    }


class Told:
    """Says what came of each cell.

    Args:
        total: cells to be run.
        say: takes one line.
    """

    def __init__(self, total: int, say: Say) -> None:
        self.total, self.say, self.done = total, say, 0
        self.begun = time.perf_counter()

    def __call__(self, result: dict[str, Any]) -> None:
        self.done += 1
        metrics = result["metrics"]
        shown = {name: metrics.get(name) for name in ("loss", "row_accuracy", "exact_match")}
        numbers = [f"{name} {value:.4f}" for name, value in shown.items() if value is not None]
        left = (time.perf_counter() - self.begun) / self.done * (self.total - self.done)
        self.say(
            f"[{self.done}/{self.total}] {result['cell']}: {', '.join(numbers) or 'diverged'} "
            f"in {result['seconds']:.1f} s" + (f", about {left / 60:.0f} min left" if left > 90 else "")
        )


def run_side_by_side(cells: Sequence[Cell], folder: StudyDir, jobs: int, told: Told) -> None:
    """Run cells in several processes of one torch thread each.

    Two processes of one thread do more than one of two threads where steps are small.
    """
    # Read by a process's libraries when they are loaded, before any code of ours runs there.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = worker_pool(min(jobs, len(cells)))
    waiting: set[Future[dict[str, Any]]] = set()
    try:
        with listening() as stop:
            waiting = {pool.submit(run_here, cell, str(folder.path)) for cell in cells}
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    told(future.result())
                if stop:
                    raise Interrupted(STOPPED, fix=GO_ON, signum=stop.signum or signal.SIGTERM)
    except BrokenProcessPool as error:
        raise RunFailed(
            "a process of the study was killed", where=f"study.jobs={jobs}", fix="is there memory for so many?"
        ) from error
    except BaseException:
        for future in waiting:
            future.cancel()
        stop_workers(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def worker_pool(count: int) -> ProcessPoolExecutor:
    """Processes that run cells, with libraries as silent as they are here."""
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=start_worker, initargs=(as_here(),))


def stop_workers(pool: ProcessPoolExecutor) -> None:
    """Ask the processes to save a checkpoint and end their cells."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)


LOADS = Loads(keep=True)
"""Of a worker process."""


def run_here(cell: Cell, folder: str) -> dict[str, Any]:
    """Run a cell in a worker process."""
    if as_here():
        hide_loading_bars()
    try:
        return run_cell(cell, StudyDir(Path(folder)), LOADS)
    except Interrupted as stopped:
        # As one that can be sent to the other process.
        raise RunFailed(str(stopped)) from None
