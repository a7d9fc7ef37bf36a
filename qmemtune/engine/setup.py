"""Builds what a run trains: rows, adapted model, and the task that joins them."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from qmemtune.adapters import apply_adapter
from qmemtune.config.schema import Config
from qmemtune.data.regression import RegressionData
from qmemtune.engine.language import LanguageTask
from qmemtune.engine.preflight import Checked
from qmemtune.engine.regression import RegressionTask, regression_base
from qmemtune.engine.shared import Loads
from qmemtune.engine.task import Task
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.loading import load_base


def build(config: Config, args: TrainingArguments, *, checked: Checked, loads: Loads, until_the_end: ExitStack) -> Task:
    """Load the base model of a run that has been checked, and join it with adapter and rows.

    Args:
        config: the run.
        args: says which process this is, and its device; the first process of a machine fills caches before the
            others read them.
        checked: the run's rows and data type.
        loads: what earlier runs loaded.
        until_the_end: closed where the run ends; the copies of 4-bit weights are kept for so long.
    """
    data, tokenizer, dtype = checked.rows.prepared, checked.rows.tokenizer, checked.dtype
    if isinstance(data, RegressionData):
        return build_regression(config, args, data=data, dtype=dtype, loads=loads)
    # The adapter's first weights and every dropout follow from here.
    set_seed(config.seed)
    with args.main_process_first(desc="model"):
        base = loads.own_copy(
            "base",
            (config.model, config.quantization),
            lambda: load_base(config.model, config.quantization, device=args.device),
        )
    model = apply_adapter(base, config.adapter, seed=config.seed)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(base, use_reentrant=config.trainer.gradient_checkpointing_use_reentrant)
    # Before the task is made, which tries the model in several forward passes.
    copies = until_the_end.enter_context(dequantized_on_cpu(model, processes=args.world_size))
    return LanguageTask(
        model, tokenizer, data, config, form=checked.form, device=args.device, dtype=dtype, copies=copies
    )


def build_regression(
    config: Config, args: TrainingArguments, *, data: RegressionData, dtype: torch.dtype, loads: Loads
) -> Task:
    """The same for a regression on generated rows."""
    with args.main_process_first(desc="model"):
        base = loads.own_copy(
            "base", (config.model.mlp, data.functions.described), lambda: regression_base(config.model.mlp, data)
        )
    set_seed(config.seed)
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
