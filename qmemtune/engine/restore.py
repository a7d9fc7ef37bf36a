"""Loads a model that answers: the live one of a run (its base with its final adapter), or a whole one by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qmemtune.adapters import InstructionSource
from qmemtune.adapters.files import check_adapter_folder
from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.schema import Config
from qmemtune.errors import UserError
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.models.loading import load_base, load_tokenizer
from qmemtune.rundir import RunDir


@dataclass
class LoadedModel:
    """A model, ready to evaluate and generate."""

    model: nn.Module
    """In eval mode, nothing trainable."""
    tokenizer: Any
    config: Config
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic."""
    source: InstructionSource


@dataclass
class LoadedRun(LoadedModel):
    """A run's model, ready to be exported too."""

    model: PeftModel


def load_run(run: RunDir, config: Config, *, device: torch.device | None = None) -> LoadedRun:
    """Load a run's base and adapter.

    Args:
        run: the run folder.
        config: the run's own config, perhaps with overrides on top.
        device: where to put the model; chosen by the hardware if not given.

    Raises:
        UserError: the run has no adapter yet, or its base cannot be loaded.
    """
    require_adapter(run)
    return load_adapted(run.adapter, config, device=device)


def require_adapter(run: RunDir) -> None:
    """See whether a run has got to its end.

    Raises:
        UserError: it has no final adapter.
    """
    if not (run.adapter / "adapter_config.json").is_file():
        raise UserError(
            "the run has no final adapter: it was interrupted or failed",
            where=str(run.path),
            fix=f"go on with it: qmemtune train run_dir={run.path} resume=auto",
        )


def load_adapted(adapter: Path, config: Config, *, device: torch.device | None = None) -> LoadedRun:
    """Load a base and put an adapter on it.

    Args:
        adapter: a PEFT folder.
        config: names base, tokenizer and quantisation.
        device: where to put the model; chosen by the hardware if not given.

    Raises:
        UserError: the base cannot be loaded, or the adapter does not fit it or is refused.
    """
    check_adapter_folder(adapter)
    device = device or pick_device()
    dtype = compute_dtype(config.model.compute_dtype, device)
    tokenizer = load_tokenizer(config.model)
    base = load_base(config.model, config.quantization, device=device)
    try:
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"the adapter does not fit this base: {two_lines(error)}",
            where=str(adapter),
            fix="use the base that it was trained on (model.path, as config.yaml of its run has it)",
        ) from error
    model.requires_grad_(False)
    model.eval()
    places = [adapter]
    if isinstance(config.adapter, QueryableConfig):
        places.insert(0, Path(config.adapter.prior_encoder))
    return LoadedRun(model, tokenizer, config, device, dtype, InstructionSource(model, tokenizer, places=places))


def load_whole(config: Config, *, device: torch.device | None = None) -> LoadedModel:
    """Load a model without an adapter.

    Args:
        config: names model, tokenizer and quantisation.
        device: where to put the model; chosen by the hardware if not given.

    Raises:
        UserError: the model cannot be loaded.
    """
    device = device or pick_device()
    tokenizer = load_tokenizer(config.model)
    model = load_base(config.model, config.quantization, device=device)
    dtype = compute_dtype(config.model.compute_dtype, device)
    return LoadedModel(model, tokenizer, config, device, dtype, InstructionSource(model, tokenizer))


def two_lines(error: Exception) -> str:
    """How an error's text begins: torch names the first parameter that does not fit on its second line."""
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__
