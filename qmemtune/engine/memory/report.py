"""What ``qmemtune estimate`` reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qmemtune.config.missing import MISSING
from qmemtune.config.regression import is_regression
from qmemtune.config.schema import Config
from qmemtune.data.packing import PackedRows
from qmemtune.data.prepare import prepare_data
from qmemtune.engine.batching import BatchForm
from qmemtune.engine.memory.estimate import RunMemory, mib
from qmemtune.engine.memory.fit import capacity, suggestions
from qmemtune.engine.memory.skeleton import base_skeleton
from qmemtune.engine.memory.workload import Workload
from qmemtune.engine.steps import count_steps
from qmemtune.errors import UserError, first_line
from qmemtune.models.hardware import pick_device
from qmemtune.models.loading import load_tokenizer


def report(config: Config, device_name: str) -> dict[str, Any]:
    """The estimate for a config's largest batch, what there is, and what would fit if it does not.

    Args:
        config: the run; its data may be missing.
        device_name: cpu, cuda, or auto for this machine's.

    Returns:
        :meth:`Estimate.as_dict` with ``model``, ``quantization``, ``dtype``, ``available_mib`` and ``fits`` (None for a
        device that is not here), ``would_fit`` and ``notes``.

    Raises:
        UserError: there is no such model, it cannot have this adapter, or the run is a regression.
    """
    if config.model.path == MISSING:
        raise UserError(
            "model.path must be given", fix="give model.path=... (its config.json is enough), or recipe=NAME"
        )
    if is_regression(config):
        raise UserError(
            "a regression's network takes a few MiB, of which there is no estimate",
            where="model.path",
            fix="give a language model",
        )
    here = pick_device()
    device = here if device_name == "auto" else torch.device(device_name)
    base = base_skeleton(config, weights=False)
    workload, notes = largest_workload(config, BatchForm.of(config, device, base=base))
    if device.type == "cuda" and here.type != "cuda" and config.model.compute_dtype == "auto":
        config = replace(config, model=replace(config.model, compute_dtype="bfloat16"))
    memory = RunMemory(config, device, base=base)
    try:
        estimate = memory.estimate(workload)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the memory of this model cannot be estimated: {type(error).__name__}: {first_line(error)}",
            where="model.path",
            fix="another model.compute_dtype may be; it can be trained all the same",
        ) from error
    limit = capacity(device) if device.type == here.type else None
    fits = None if limit is None else estimate.total <= limit
    ways = suggestions(memory, workload, limit) if limit is not None and not fits else []
    return {
        "model": config.model.path,
        "quantization": config.quantization.kind,
        "dtype": str(memory.dtype).removeprefix("torch."),
        **estimate.as_dict(),
        "available_mib": None if limit is None else mib(limit),
        "fits": fits,
        "would_fit": [{"overrides": way.overrides, "total_mib": mib(way.total)} for way in ways],
        "notes": notes,
    }


def largest_workload(config: Config, form: BatchForm) -> tuple[Workload, list[str]]:
    """The largest batch of a run, by its rows if they are at hand; and what to say if they are not."""
    long = f"rows are taken to be as long as data.max_length={config.data.max_length}, all in the loss"
    if config.data.path == MISSING and not config.data.sources:
        return Workload.of(config, form), [f"no data are given: {long}"]
    try:
        rows = prepare_data(config.data, load_tokenizer(config.model)).train
    except UserError as error:
        return Workload.of(config, form), [f"the rows cannot be read ({error.findings[0].problem}): {long}"]
    made = PackedRows(rows, config.data.max_length) if form.packed else rows
    steps = count_steps(len(made), config.trainer, config.optimizer, world_size=1)
    return Workload.of(config, form, made, epochs=steps.total / steps.per_epoch), []
