"""What can be known about a run before it starts: checked together, reported at once, nothing heavy before."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from qmemtune.adapters import check_method, check_targets, describe
from qmemtune.adapters.queryable import QueryableLinear
from qmemtune.config.checks import endless_warmup
from qmemtune.config.regression import is_regression
from qmemtune.config.schema import Config
from qmemtune.data.packing import PackedRows
from qmemtune.data.prepare import Progress, prepare_data, silent
from qmemtune.data.prepared import PreparedData
from qmemtune.data.regression import RegressionData, TensorRows, prepare_regression
from qmemtune.data.rows import TokenRows
from qmemtune.engine.arguments import refuse_data_parallel
from qmemtune.engine.batching import BatchForm
from qmemtune.engine.compiling import check_compiler, has_fused_layers, has_training_attention
from qmemtune.engine.findings import Findings
from qmemtune.engine.folder import Opened, open_run, run_dtype
from qmemtune.engine.made_with import check_unchanged, made_with
from qmemtune.engine.memory.estimate import TRAINED_ITEMSIZE, RunMemory
from qmemtune.engine.memory.fit import Memory, capacity, fit_warning, size
from qmemtune.engine.memory.skeleton import adapted_skeleton, base_skeleton
from qmemtune.engine.memory.weights import optimizer_bytes
from qmemtune.engine.memory.workload import Workload
from qmemtune.engine.parallel import from_first
from qmemtune.engine.resume import check_resumable
from qmemtune.engine.shared import Loads
from qmemtune.engine.steps import StepCount, count_steps
from qmemtune.engine.tracking import check_backends
from qmemtune.errors import UserError
from qmemtune.models.bitsandbytes import bitsandbytes_config
from qmemtune.models.head import output_head
from qmemtune.models.loading import load_tokenizer, refuse_second_quantization
from qmemtune.rundir import RunDir


@dataclass(frozen=True)
class Rows:
    """A run's rows, and what made them."""

    prepared: PreparedData | RegressionData
    train: TokenRows | PackedRows | TensorRows
    """Training rows as batches see them."""
    tokenizer: Any
    """None in a regression."""


@dataclass(frozen=True)
class Checked:
    """A run that can start, and what was found out on the way."""

    opened: Opened
    dtype: torch.dtype
    rows: Rows
    form: BatchForm
    """Of the batches, if the model allows it."""
    steps: StepCount
    total_parameters: int
    """Of the base."""
    adapter: dict[str, Any]
    """See :func:`qmemtune.adapters.describe`."""
    memory: Memory | None
    """None for a regression, and where the model cannot be estimated."""
    notes: list[str]
    """What the user should know, one line each; warnings about rows stand in the rows' own report."""


def preflight(
    config: Config,
    *,
    device: torch.device,
    args: TrainingArguments | None = None,
    write_rejected: bool = False,
    loads: Loads | None = None,
    progress: Progress = silent,
) -> Checked:
    """Check config, folder, rows, template, adapter, quantisation, checkpoint, disk and memory of a run.

    Tokenizer and rows are really loaded; of the model only its config is read.

    Args:
        config: the run.
        device: where it trains.
        args: of a run that is going to start, which knows of its other processes.
        write_rejected: write unusable rows into the run folder.
        loads: what earlier runs loaded.
        progress: is told how far the rows are.

    Raises:
        UserError: with everything that would stop the run.
    """
    found, loads = Findings(), loads or Loads()
    found.attempt(refuse_data_parallel)
    found.attempt(lambda: check_backends(config.tracking))
    notes = found.attempt(lambda: check_method(config.adapter)) or []
    if config.trainer.compile and not is_regression(config):
        found.attempt(lambda: check_compiler(device))
    dtype = found.attempt(lambda: run_dtype(config, device))
    opened = found.attempt(
        lambda: open_run(config) if args is None else from_first(lambda: open_run(config, make=True), args)
    )
    if opened is not None:
        notes = [*notes, *opened.notes]
    rejected = opened.run.rejected if opened is not None and write_rejected else None
    with args.main_process_first(desc="data") if args is not None else nullcontext():
        rows = load_rows(config, rejected, loads, found, progress)
    found.attempt(lambda: bitsandbytes_config(config.quantization, dtype or torch.float32))
    base = found.attempt(lambda: base_skeleton(config))
    world_size = 1 if args is None else args.world_size
    total, model, memory = 0, None, None
    if base is not None:
        total = sum(parameter.numel() for parameter in base.parameters())
        found.attempt(lambda: check_targets(base, config.adapter, quantised=config.quantization.kind != "none"))
        own = getattr(getattr(base, "config", None), "quantization_config", None)
        found.attempt(lambda: refuse_second_quantization(config.model.path, own, config.quantization))
        if is_regression(config):
            model = found.attempt(lambda: adapted_skeleton(config, base))
        else:
            memory = found.attempt(lambda: RunMemory(config, device, base=base, dtype=dtype, processes=world_size))
            if memory is not None:
                model = memory.model
                found.attempt(partial(refuse_routed_head, model))
    form = BatchForm.of(config, device, base=base, checkpoint=None if opened is None else opened.checkpoint)
    steps = None
    if rows is not None:
        steps = count_steps(len(rows.train), config.trainer, config.optimizer, world_size=world_size)
        found.attempt(partial(check_warmup, config, steps))
    if model is not None and steps is not None and opened is not None:
        sharded = args is not None and is_sharded(args)
        check_start(config, opened, model, steps, found, world_size=world_size, sharded=sharded)
        if rows is not None and dtype is not None and not found.found:
            changed = found.attempt(
                lambda: check_changes(config, opened, rows, steps, form, dtype=dtype, device=device)
            )
            notes = [*notes, *(changed or [])]
    if (
        found.found
        and opened is not None
        and args is not None
        and config.run_dir is None
        and config.resume.path is None
    ):
        # The folder was made for this run; it stays if unusable rows were written into it.
        with suppress(OSError):
            opened.run.path.rmdir()
    agree(found, args)
    assert dtype is not None
    assert opened is not None
    assert rows is not None
    assert steps is not None
    assert model is not None
    adapter = describe(model)
    estimated, warning = None, None
    if memory is not None:
        estimated, warning = check_memory(memory, device, rows, form, steps, loads, world_size=world_size)
    if warning is not None:
        notes = [*notes, f"warning: {warning}"]
    return Checked(opened, dtype, rows, form, steps, total, adapter, estimated, notes)


def load_rows(config: Config, rejected: Path | None, loads: Loads, found: Findings, progress: Progress) -> Rows | None:
    """Tokenizer and rows; None, with findings, where they cannot be had."""
    if is_regression(config):
        made = prepare_regression(config)
        return Rows(made, made.train, None)
    tokenizer = found.attempt(lambda: loads.same("tokenizer", config.model, lambda: load_tokenizer(config.model)))
    if tokenizer is None:
        return None
    key = (config.model, config.data)
    data = found.attempt(
        lambda: loads.same(
            "data", key, lambda: prepare_data(config.data, tokenizer, rejected_path=rejected, progress=progress)
        )
    )
    if data is None:
        return None
    packing = config.trainer.packing
    return Rows(data, PackedRows(data.train, config.data.max_length) if packing else data.train, tokenizer)


def check_warmup(config: Config, steps: StepCount) -> None:
    """Raise UserError for a warm-up that does not end, of a run whose length follows from its rows."""
    for key, problem, fix in endless_warmup(config, steps.total):
        raise UserError(problem, where=key, fix=fix)


def refuse_routed_head(model: PeftModel) -> None:
    """Raise UserError for an output head with a queryable memory.

    Loss and generation hand it some of the positions only, and routes belong to all of them.
    """
    if isinstance(output_head(model.get_base_model()), QueryableLinear):
        raise UserError(
            "the output head cannot have a queryable memory",
            where="adapter.target_modules",
            fix="leave it out, or use adapter=lora",
        )


def check_start(
    config: Config,
    opened: Opened,
    model: PeftModel,
    steps: StepCount,
    found: Findings,
    *,
    world_size: int,
    sharded: bool,
) -> None:
    """Whether the checkpoint fits the run, and the disk what the run will write."""
    checkpoint = opened.checkpoint
    if checkpoint is not None:
        found.attempt(
            lambda: check_resumable(
                checkpoint, model, world_size=world_size, rows_per_step=steps.rows_per_step, sharded=sharded
            )
        )
    found.attempt(lambda: check_disk(opened.run, disk_bytes(config, model, steps)))


def check_changes(
    config: Config,
    opened: Opened,
    rows: Rows,
    steps: StepCount,
    form: BatchForm,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """What the user should know about changes since the checkpoint was written; UserError if they are not allowed."""
    if opened.checkpoint is None:
        return []
    heldout = rows.prepared.heldout
    now = made_with(config, rows.train, heldout, steps, batches=form.settings(), dtype=dtype, device=device)
    return check_unchanged(opened.checkpoint, now, config)


def disk_bytes(config: Config, model: nn.Module, steps: StepCount) -> int:
    """What checkpoints and the final adapter take at most, with the one that is being written."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = sum(parameter.numel() for parameter in trained) * TRAINED_ITEMSIZE
    best = adapter if config.trainer.keep_best else 0
    every = config.trainer.save_steps
    saved = 1 if every is None else -(-steps.total // every)
    kept = min(saved, (config.trainer.save_total_limit or saved) + 1)
    return kept * (adapter + best + optimizer_bytes(trained, config.optimizer)) + adapter


def check_disk(run: RunDir, needed: int) -> None:
    """Raise UserError if the disk of the run folder is too full, or the folder cannot be written."""
    folder = run.path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise UserError("the run folder cannot be written", where=str(folder), fix="choose another with run_dir=FOLDER")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"checkpoints and adapter take about {size(needed)}, and the disk has {size(free)} left",
            where=str(folder),
            fix="free some, lower trainer.save_total_limit, or choose another disk with run_dir=FOLDER",
        )


def check_memory(
    memory: RunMemory,
    device: torch.device,
    rows: Rows,
    form: BatchForm,
    steps: StepCount,
    loads: Loads,
    *,
    world_size: int = 1,
) -> tuple[Memory | None, str | None]:
    """Estimates for the run, and a warning where it does not fit.

    A model that cannot be run without its numbers is not estimated; that stops nothing.
    """
    assert not isinstance(rows.train, TensorRows)
    config = memory.config
    workload = Workload.of(config, form, rows.train, epochs=steps.total / steps.per_epoch, world_size=world_size)
    forms = (has_fused_layers(config), has_training_attention(config))
    parts = (config.model, config.quantization, config.adapter, config.optimizer, memory.dtype)
    key = (*parts, forms, workload, world_size)

    def traced() -> RunMemory:
        memory.estimate(workload)
        return memory

    try:
        memory = loads.same("memory", key, traced)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a model's own code on tensors without numbers can fail in any way
        reason = (str(error).splitlines() or [""])[0]
        return None, f"memory is not estimated: {type(error).__name__}: {reason}"
    share = world_size if device.type == "cpu" else 1
    return Memory(memory, workload), fit_warning(memory, workload, capacity(device) / share)


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed hold the weights and write checkpoints in their own way."""
    return bool(args.fsdp or args.deepspeed) or any(
        os.environ.get(name, "").lower() == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )


def agree(found: Findings, args: TrainingArguments | None) -> None:
    """Report findings; the first process's in all processes, so that none waits for another that has gone."""
    if args is not None:
        from_first(found.report, args)
    found.report()
