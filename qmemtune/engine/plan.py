"""What a run would do, found out without training, loading weights or writing anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qmemtune.adapters import apply_adapter, check_method, describe
from qmemtune.config.adapters import AdapterConfig, LoraConfig
from qmemtune.config.checks import is_regression
from qmemtune.config.compose import Composed
from qmemtune.config.schema import Config, ModelConfig
from qmemtune.data.packing import PackedRows
from qmemtune.data.prepare import prepare_data
from qmemtune.data.regression import prepare_regression
from qmemtune.engine.arguments import refuse_data_parallel
from qmemtune.engine.folder import open_run
from qmemtune.engine.steps import count_steps
from qmemtune.engine.tracking import check_backends
from qmemtune.models.failures import explained
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.models.loading import load_tokenizer
from qmemtune.models.mlp import Mlp
from qmemtune.models.sources import resolve

BYTES_PER_WEIGHT = 4
"""Adapter weights are trained and saved in float32."""


def plan(composed: Composed) -> dict[str, Any]:
    """Check a run and count what it would do (``train --dry-run``).

    The tokenizer and all rows are really loaded and tokenised; of the model only its structure.

    Returns:
        ``run_dir``, ``model``, ``device``, ``dtype``, ``rows``, ``heldout_rows``, ``tokens_per_epoch``, ``tokens``
        (of the whole run, estimated from the epochs), ``steps``, ``steps_per_epoch``, ``warmup_steps``,
        ``first_step``, ``total_parameters``, the adapter's facts, ``adapter_mb`` (10^6 bytes), ``data``, ``warnings``.

    Raises:
        UserError: what would stop the run before its first step, as far as it can be known without the weights.
    """
    config = composed.config
    refuse_data_parallel()
    check_backends(config.tracking)
    opened = open_run(config)
    device = pick_device()
    dtype = compute_dtype(config.model.compute_dtype, device)
    notes = check_method(config.adapter)
    rows = counted_rows(config)
    steps = count_steps(rows.train, config.trainer, config.optimizer)
    total, adapter = adapter_facts(config)
    return {
        "run_dir": str(opened.run.path),
        "model": config.model.path,
        "quantization": config.quantization.kind,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows.train,
        "heldout_rows": rows.heldout,
        "tokens_per_epoch": rows.tokens,
        "tokens": round(rows.tokens * steps.total / steps.per_epoch),
        "steps": steps.total,
        "steps_per_epoch": steps.per_epoch,
        "warmup_steps": steps.warmup,
        "rows_per_step": steps.rows_per_step,
        "first_step": opened.checkpoint.step if opened.checkpoint else 0,
        "total_parameters": total,
        **adapter,
        "adapter_mb": round(adapter["trainable_parameters"] * BYTES_PER_WEIGHT / 1e6, 3),
        "data": rows.report,
        "warnings": [*composed.warnings, *notes, *opened.notes, *rows.warnings],
    }


@dataclass(frozen=True)
class CountedRows:
    """A run's rows, by number."""

    train: int
    heldout: int
    tokens: int
    """In all training rows; of a regression a row counts as one."""
    report: dict[str, Any]
    warnings: list[str]


def counted_rows(config: Config) -> CountedRows:
    """Read and count a run's rows."""
    if is_regression(config):
        made = prepare_regression(config)
        return CountedRows(len(made.train), len(made.heldout), len(made.train), made.as_dict(), [])
    data = prepare_data(config.data, load_tokenizer(config.model))
    tokens = data.report.train.tokens
    rows = PackedRows(data.train, config.data.max_length) if config.trainer.packing else data.train
    return CountedRows(len(rows), len(data.heldout), tokens, data.report.as_dict(), data.report.warnings)


def adapter_facts(config: Config) -> tuple[int, dict[str, Any]]:
    """Parameters of the base model, and the facts of :func:`qmemtune.adapters.describe`; loads no weights."""
    base: nn.Module
    if is_regression(config):
        shape, mlp = config.data.regression, config.model.mlp
        base = Mlp(shape.inputs, shape.outputs, width=mlp.width, depth=mlp.depth).requires_grad_(False)
    else:
        base = skeleton(config.model)
    total = sum(parameter.numel() for parameter in base.parameters())
    return total, describe(apply_adapter(base, without_weights(config.adapter), seed=config.seed))


def skeleton(config: ModelConfig) -> PreTrainedModel:
    """The base model without weights: every tensor has a shape and no memory."""
    source = resolve(config.path, config.revision)
    with explained(source):
        loaded = AutoConfig.from_pretrained(
            source.location, revision=source.revision or "main", trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                loaded, trust_remote_code=config.trust_remote_code
            )
    return model.requires_grad_(False)


def without_weights(adapter: AdapterConfig) -> AdapterConfig:
    """The same adapter with an initialisation that does not look at the base's weights."""
    return replace(adapter, init="default") if isinstance(adapter, LoraConfig) else adapter
