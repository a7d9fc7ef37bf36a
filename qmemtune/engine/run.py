"""One training run, from a composed config to a run folder."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qmemtune.adapters import describe
from qmemtune.config.compose import Composed
from qmemtune.config.dump import to_yaml
from qmemtune.config.schema import Config, ResumeConfig
from qmemtune.data.changes import WatchedFiles
from qmemtune.engine import checkpoints
from qmemtune.engine.arguments import refuse_data_parallel, settle, training_arguments
from qmemtune.engine.assembly import make_trainer
from qmemtune.engine.determinism import deterministic_kernels
from qmemtune.engine.environment import describe_environment
from qmemtune.engine.folder import Opened, open_run, resume_command, run_dtype
from qmemtune.engine.interrupt import Interrupted, listening
from qmemtune.engine.lock import in_use
from qmemtune.engine.memory.exhausted import memory_errors_explained
from qmemtune.engine.memory.fit import capacity
from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.parallel import from_first
from qmemtune.engine.preflight import Checked, preflight
from qmemtune.engine.progress import Progress, SilentProgress
from qmemtune.engine.results import summarise, write_results
from qmemtune.engine.setup import build
from qmemtune.engine.shared import Loads
from qmemtune.engine.steps import count_steps
from qmemtune.engine.task import Task
from qmemtune.engine.tracking import use_folder
from qmemtune.engine.trainer import RunTrainer
from qmemtune.errors import UserError, first_line
from qmemtune.models.hardware import pick_device
from qmemtune.rundir import RUN_FORMAT, RunDir, write_format, write_json, write_text

MakeTask = Callable[[TrainingArguments, torch.dtype], Task]


def train(
    composed: Composed,
    *,
    progress: Progress | None = None,
    loads: Loads | None = None,
    make_task: MakeTask | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Train an adapter and write the run folder.

    Args:
        composed: the run's config.
        progress: is told what happens; in the first process only.
        loads: what earlier runs of this process loaded, to be used again where it is the same.
        make_task: makes another task than the config's own; the adapter is the config's all the same.
        until: stop after this optimizer step, with a checkpoint; nothing is written that marks an end.

    Returns:
        The summary that summary.json holds.

    Raises:
        UserError: something in the config, the data or the checkpoint to resume cannot be used.
        Diverged: too many steps in a row had a loss or gradient that is no number.
        Interrupted: a signal stopped the run; a checkpoint is saved.
    """
    config = composed.config
    loads = loads or Loads()
    device = pick_device()
    try:
        refuse_data_parallel()
        dtype = run_dtype(config, device)
    except UserError:
        # Trainer's arguments cannot be made; whatever else is wrong is told together with this.
        preflight(config, device=device, loads=loads)
        raise
    args = training_arguments(config, device=device, dtype=dtype)
    first = args.process_index == 0
    if progress is None or not first:
        progress = SilentProgress()
    # Before the rows are read: what changes while they are is noticed, too.
    files = WatchedFiles(config.data if make_task is None and first else None)
    checked = None
    if make_task is None:
        checked = preflight(
            config, device=args.device, args=args, write_rejected=first, loads=loads, progress=progress.rows
        )
    opened = from_first(lambda: open_run(config, make=True), args) if checked is None else checked.opened
    for note in opened.notes if checked is None else checked.notes:
        progress.message(note)
    kernels = deterministic_kernels(config.trainer.deterministic, config.seed)
    with in_use(opened.run) if first else nullcontext(), kernels, ExitStack() as until_the_end:
        return run_in_folder(
            composed,
            opened,
            args,
            dtype,
            checked=checked,
            progress=progress,
            loads=loads,
            make_task=make_task,
            files=files,
            until=until,
            until_the_end=until_the_end,
        )


def run_in_folder(
    composed: Composed,
    opened: Opened,
    args: TrainingArguments,
    dtype: torch.dtype,
    *,
    checked: Checked | None,
    progress: Progress,
    loads: Loads,
    make_task: MakeTask | None,
    files: WatchedFiles,
    until: int | None,
    until_the_end: ExitStack,
) -> dict[str, Any]:
    """:func:`train` from where the run folder is this run's.

    Args:
        composed: the run's config.
        opened: its folder, and where it goes on from.
        args: Trainer's arguments.
        dtype: of the arithmetic.
        checked: what was found out before; None if ``make_task`` makes the task.
        progress: is told what happens.
        loads: what earlier runs of this process loaded.
        make_task: see :func:`train`.
        files: the files that the rows come from.
        until: see :func:`train`.
        until_the_end: closed where the run ends.
    """
    config, run, memory = composed.config, opened.run, checked.memory if checked else None
    first = args.process_index == 0
    if first:
        for path in open_folder(opened, composed, args, dtype):
            progress.message(f"a damaged checkpoint is kept as {path}: nothing uses it, and it may be deleted")
    with memory_errors_explained(memory, lambda: capacity(args.device)):
        if make_task is not None:
            task = make_task(args, dtype)
        else:
            assert checked is not None
            progress.message(f"loading the base model: {config.model.path} ...")
            task = build(config, args, checked=checked, loads=loads, until_the_end=until_the_end)
    if first:
        write_config(run, task.resolved(config))
    for line in [*task.report.lines(), *task.notes(args.world_size)]:
        progress.message(line)
    steps = count_steps(len(task.rows), config.trainer, config.optimizer, world_size=args.world_size)
    settle(args, run, steps)
    use_folder(config.tracking, run)
    with listening() as stop:
        trainer = make_trainer(config, args, task, run, steps, progress, stop, opened, files, until)
        progress.start(
            steps.total,
            {
                "run_dir": str(run.path),
                "first_step": opened.checkpoint.step if opened.checkpoint else 0,
                "device": str(args.device),
                "dtype": str(dtype).removeprefix("torch."),
                "rows": len(task.rows),
                "total_parameters": sum(p.numel() for p in task.model.parameters()),
                **describe(task.model),
            },
        )
        try:
            with memory_errors_explained(memory, lambda: capacity(args.device)):
                go(trainer, opened)
        finally:
            progress.finish()
        if trainer.parts.bad_steps.exhausted:
            step = trainer.state.global_step
            saved = trainer.saved(f"the state before them is kept in checkpoint-{step}")
            raise trainer.parts.bad_steps.diverged(step, saved)
        if trainer.interrupted:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {steps.total}; "
                + trainer.saved("the checkpoint is saved"),
                where=str(run.path),
                fix=f"go on with: {resume_command(sys.argv, run)}",
                signum=stop.signum or 15,
            )
    if trainer.paused:
        return summarise(trainer, task, run, memory)
    summary = write_results(trainer, task, run, memory)
    if args.world_size > 1:
        torch.distributed.destroy_process_group()
    return summary


def open_folder(opened: Opened, composed: Composed, args: TrainingArguments, dtype: torch.dtype) -> list[Path]:
    """Write what is known before training, and remove what does not belong to the run that now starts.

    Returns:
        Damaged checkpoints that are kept under these names.
    """
    run = opened.run
    run.path.mkdir(parents=True, exist_ok=True)
    run.summary.unlink(missing_ok=True)
    write_format(run.path, RUN_FORMAT)
    write_config(run, composed.config)
    facts = describe_environment(seed=composed.config.seed, world_size=args.world_size, dtype=dtype)
    write_json(run.environment, facts)
    step = -1 if opened.checkpoint is None else opened.checkpoint.step
    for path in run.logs:
        JsonLines(path).truncate(step, opened.checkpoint.log_lines.get(path.name) if opened.checkpoint else None)
    run.checkpoints.mkdir(exist_ok=True)
    return checkpoints.remove_later(run.checkpoints, step)


def write_config(run: RunDir, config: Config) -> None:
    """Write the run's config, without how this process went on with it: that checkpoint may be gone later."""
    write_text(run.config, to_yaml(replace(config, resume=ResumeConfig())))


def go(trainer: RunTrainer, opened: Opened) -> None:
    """Train, or, when the checkpoint holds the last step already, only load it and finish."""
    if opened.checkpoint is None:
        trainer.train()
    elif opened.checkpoint.step < trainer.parts.steps.total:
        try:
            trainer.train(resume_from_checkpoint=str(opened.checkpoint.path))
        except pickle.UnpicklingError as error:
            raise UserError(
                f"a state in the checkpoint is refused, since loading it could run code: {first_line(error)}",
                where=str(opened.checkpoint.path),
                fix="go on from a checkpoint of your own",
            ) from error
    else:
        trainer.parts.progress.message(
            f"all {trainer.parts.steps.total} steps are done already: nothing is trained "
            "(a larger trainer.max_steps or trainer.num_train_epochs goes on, with resume.allow_changes=true)"
        )
        trainer.only_finish(opened.checkpoint)
