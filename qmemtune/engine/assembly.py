"""Puts a run's trainer together."""

from __future__ import annotations

from transformers import TrainingArguments

from qmemtune.config.schema import Config
from qmemtune.data.changes import WatchedFiles
from qmemtune.data.sampler import LengthGroupedSampler
from qmemtune.engine.bad_steps import BadSteps
from qmemtune.engine.best import Best
from qmemtune.engine.folder import Opened
from qmemtune.engine.heldout import HeldOut, Measured
from qmemtune.engine.interrupt import StopRequest
from qmemtune.engine.made_with import made_with
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.parts import Parts
from qmemtune.engine.preflight import is_sharded
from qmemtune.engine.progress import Progress
from qmemtune.engine.resume import check_resumable
from qmemtune.engine.step_profile import StepProfile
from qmemtune.engine.steps import StepCount
from qmemtune.engine.task import Task
from qmemtune.engine.totals import Totals
from qmemtune.engine.trainer import RunTrainer
from qmemtune.engine.unwritten import Unwritten
from qmemtune.rundir import RunDir


def make_trainer(
    config: Config,
    args: TrainingArguments,
    task: Task,
    run: RunDir,
    steps: StepCount,
    progress: Progress,
    stop: StopRequest,
    opened: Opened,
    files: WatchedFiles,
    until: int | None,
) -> RunTrainer:
    """Put the trainer together; with a checkpoint, after checking that it fits."""
    first = args.process_index == 0
    totals, best, measured = Totals(), Best(config.trainer.keep_best), Measured()
    sampler = task.sampler(config, args.world_size)
    if opened.checkpoint is not None:
        if isinstance(sampler, LengthGroupedSampler):
            sampler.order = opened.checkpoint.row_order
        check_resumable(
            opened.checkpoint,
            task.model,
            world_size=args.world_size,
            rows_per_step=steps.rows_per_step,
            sharded=is_sharded(args),
        )
        totals = Totals.load(opened.checkpoint.path)
        best = Best.load(opened.checkpoint.path, keep_weights=config.trainer.keep_best)
        measured = Measured.load(opened.checkpoint.path, otherwise=best.last_step)
    unwritten = Unwritten(run, progress.message)
    heldout = HeldOut(
        task=task,
        samples=JsonLines(run.samples, enabled=first, failed=unwritten.line),
        stop=stop,
        world_size=args.world_size,
        measured=measured,
    )
    metrics = JsonLines(run.metrics, enabled=first, failed=unwritten.line)
    bad_steps = BadSteps(
        config.trainer.max_bad_steps,
        log=JsonLines(run.bad_steps, enabled=first, failed=unwritten.line),
        metrics=metrics,
        progress=progress,
        totals=totals,
    )
    parts = Parts(
        config=config,
        sampler=sampler,
        task=task,
        heldout=heldout,
        steps=steps,
        metrics=metrics,
        progress=progress,
        stop=stop,
        totals=totals,
        best=best,
        until=until,
        made_with=made_with(
            config,
            task.rows,
            task.heldout,
            steps,
            batches=task.form.settings(),
            dtype=task.dtype,
            device=args.device,
        ),
        bad_steps=bad_steps,
        unwritten=unwritten,
        files=files,
    )
    trainer = RunTrainer(args, parts)
    if config.trainer.profile and first:
        trainer.add_callback(StepProfile(run.profile, progress.message))
    return trainer
