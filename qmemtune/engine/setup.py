"""Builds what a run trains: tokenizer, rows, adapted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments, set_seed

from qmemtune.adapters import InstructionSource, apply_adapter
from qmemtune.config.schema import Config
from qmemtune.data.prepare import PreparedData, prepare_data
from qmemtune.models.loading import load_base, load_tokenizer


@dataclass
class Materials:
    """What a run trains, and on what."""

    tokenizer: Any
    data: PreparedData
    model: PeftModel
    source: InstructionSource


def build(config: Config, args: TrainingArguments, *, device: torch.device, rejected: Path | None) -> Materials:
    """Load everything a run needs.

    Args:
        config: the run.
        args: says which process this is; the first one of a machine fills caches before the others read them.
        device: where the model goes.
        rejected: where to write unusable rows; None in the processes that write nothing.
    """
    with args.main_process_first(desc="data"):
        tokenizer = load_tokenizer(config.model)
        data = prepare_data(config.data, tokenizer, rejected_path=rejected)
    # The adapter's first weights and every dropout follow from here.
    set_seed(config.seed, deterministic=config.trainer.deterministic)
    with args.main_process_first(desc="model"):
        base = load_base(config.model, config.quantization, device=device)
    model = apply_adapter(base, config.adapter, seed=config.seed)
    if config.trainer.gradient_checkpointing:
        checkpoint_activations(base, use_reentrant=config.trainer.gradient_checkpointing_use_reentrant)
    return Materials(tokenizer, data, model, InstructionSource(model, tokenizer))


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
