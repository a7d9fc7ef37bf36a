"""Writes a checkpoint in all processes, and names it when each has written its part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import TrainingArguments

from qmemtune.engine import checkpoints
from qmemtune.engine.own_state import save_own_state
from qmemtune.engine.parts import Parts
from qmemtune.rundir import RunDir


def save_checkpoint(
    parts: Parts, args: TrainingArguments, accelerator: Accelerator, *, step: int, write: Callable[[], None]
) -> bool:
    """Save the state after a step.

    Args:
        parts: the run.
        args: Trainer's arguments; checkpoints lie in their ``output_dir``.
        accelerator: joins the processes.
        step: the step that was made last.
        write: writes Trainer's files into :data:`qmemtune.engine.checkpoints.WRITING`.

    Returns:
        Whether the checkpoint is there; if not, ``parts.unwritten`` knows why.
    """
    root, writer = Path(args.output_dir), args.should_save
    name, unwritten = f"checkpoint-{step}", parts.unwritten
    with unwritten.instead(name):
        if writer:
            checkpoints.begin(root)
    accelerator.wait_for_everyone()
    with unwritten.instead(name):
        write()
    # A checkpoint is whole when every process has written its part.
    failed = torch.tensor(float(name in unwritten.reasons), device=args.device)
    missing = bool(accelerator.reduce(failed, "sum").item() > 0)
    if writer and not missing:
        with unwritten.instead(name):
            complete_checkpoint(parts, args, root / checkpoints.WRITING / name, step=step)
        missing = name in unwritten.reasons
    if writer and missing:
        shutil.rmtree(root / checkpoints.WRITING, ignore_errors=True)
    accelerator.wait_for_everyone()
    return not missing


def complete_checkpoint(parts: Parts, args: TrainingArguments, written: Path, *, step: int) -> None:
    """Add the run's own state to what Trainer wrote, give the checkpoint its name, and delete those over the limit."""
    root = Path(args.output_dir)
    facts = save_own_state(parts, written, RunDir(root.parent), step)
    newest = checkpoints.complete(written, root, {**facts, "world_size": args.world_size})
    if not parts.bad_steps.exhausted:
        # Weights that lead to bad steps only may be worse than those of every earlier checkpoint.
        checkpoints.rotate(root, parts.config.trainer.save_total_limit, newest=newest)


@contextmanager
def without_frozen_head(model: PeftModel) -> Iterator[None]:
    """Whatever saves the model meanwhile saves what the adapter trains, and nothing else.

    By itself PEFT adds the whole output head of the base where the adapter has an update of it, in case its vocabulary
    was resized. No base is resized here, and modules that the adapter trains whole are saved in any case.
    """
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained
