"""What a run would do, found out without training, loading weights or writing anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qmemtune.adapters import apply_adapter, describe
from qmemtune.config.adapters import AdapterConfig, LoraConfig
from qmemtune.config.compose import Composed
from qmemtune.config.schema import ModelConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.engine.arguments import refuse_data_parallel
from qmemtune.engine.folder import open_run
from qmemtune.engine.steps import count_steps
from qmemtune.engine.tracking import check_backends
from qmemtune.models.failures import explained
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.models.loading import load_tokenizer
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
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer)
    steps = count_steps(len(data.train), config.trainer, config.optimizer)
    base = skeleton(config.model)
    total = base.num_parameters()
    adapter = describe(apply_adapter(base, without_weights(config.adapter), seed=config.seed))
    tokens = data.report.train.tokens
    return {
        "run_dir": str(opened.run.path),
        "model": config.model.path,
        "quantization": config.quantization.kind,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": len(data.train),
        "heldout_rows": len(data.heldout),
        "tokens_per_epoch": tokens,
        "tokens": round(tokens * steps.total / steps.per_epoch),
        "steps": steps.total,
        "steps_per_epoch": steps.per_epoch,
        "warmup_steps": steps.warmup,
        "rows_per_step": steps.rows_per_step,
        "first_step": opened.checkpoint.step if opened.checkpoint else 0,
        "total_parameters": total,
        **adapter,
        "adapter_mb": round(adapter["trainable_parameters"] * BYTES_PER_WEIGHT / 1e6, 3),
        "data": data.report.as_dict(),
        "warnings": [*composed.warnings, *opened.notes, *data.report.warnings],
    }


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
