"""Builds what a run trains: rows, adapted model, and the task that joins them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from qmemtune.adapters import apply_adapter
from qmemtune.config.checks import is_regression
from qmemtune.config.schema import Config
from qmemtune.data.prepare import Progress, prepare_data, silent
from qmemtune.data.regression import prepare_regression
from qmemtune.engine.language import LanguageTask
from qmemtune.engine.regression import RegressionTask, regression_base
from qmemtune.engine.shared import Loads
from qmemtune.engine.task import Task
from qmemtune.models.loading import load_base, load_tokenizer


def build(
    config: Config,
    args: TrainingArguments,
    *,
    dtype: torch.dtype,
    rejected: Path | None,
    loads: Loads,
    progress: Progress = silent,
) -> Task:
    """Load everything a run needs.

    Args:
        config: the run.
        args: says which process this is, and its device; the first process of a machine fills caches before the
            others read them.
        dtype: of the arithmetic.
        rejected: where to write unusable rows; None in the processes that write nothing.
        loads: what earlier runs loaded.
        progress: is told how far the rows are.
    """
    if is_regression(config):
        return build_regression(config, args, dtype=dtype, loads=loads)
    with args.main_process_first(desc="data"):
        tokenizer = loads.same("tokenizer", config.model, lambda: load_tokenizer(config.model))
        data = loads.same(
            "data",
            (config.model, config.data),
            lambda: prepare_data(config.data, tokenizer, rejected_path=rejected, progress=progress),
        )
    # The adapter's first weights and every dropout follow from here.
    set_seed(config.seed, deterministic=config.trainer.deterministic)
    with args.main_process_first(desc="model"):
        base = loads.own_copy(
            "base",
            (config.model, config.quantization),
            lambda: load_base(config.model, config.quantization, device=args.device),
        )
    model = apply_adapter(base, config.adapter, seed=config.seed)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(base, use_reentrant=config.trainer.gradient_checkpointing_use_reentrant)
    return LanguageTask(model, tokenizer, data, config, device=args.device, dtype=dtype)


def build_regression(config: Config, args: TrainingArguments, *, dtype: torch.dtype, loads: Loads) -> Task:
    """The same for a regression on generated rows."""
    data = prepare_regression(config)
    with args.main_process_first(desc="model"):
        base = loads.own_copy(
            "base", (config.model.mlp, data.functions.described), lambda: regression_base(config.model.mlp, data)
        )
    set_seed(config.seed, deterministic=config.trainer.deterministic)
    model = apply_adapter(base.to(args.device), config.adapter, seed=config.seed)
    return RegressionTask(model, data, config, device=args.device, dtype=dtype)


def checkpoint_activations(base: nn.Module, *, use_reentrant: bool) -> None:
    """Recompute activations in the backward pass."""
    options = {"use_reentrant": use_reentrant}
    # transformers renamed the method; the old name goes in its version 6.
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    if use_reentrant:
        # Reentrant recomputation returns no gradient unless an input asks for one.
        base.enable_input_require_grads()  # type: ignore[operator]
