"""What a run would do, found out without training, loading weights or writing anything."""

from __future__ import annotations

from typing import Any

from qmemtune.adapters import describe
from qmemtune.config.compose import Composed
from qmemtune.config.schema import Config
from qmemtune.data.regression import TensorRows
from qmemtune.engine.batching import padding_share
from qmemtune.engine.memory.estimate import TRAINED_ITEMSIZE
from qmemtune.engine.memory.skeleton import adapted_skeleton, base_skeleton
from qmemtune.engine.preflight import preflight
from qmemtune.models.hardware import pick_device


def plan(composed: Composed) -> dict[str, Any]:
    """Check a run and count what it would do (``train --dry-run``).

    Returns:
        ``run_dir``, ``model``, ``device``, ``dtype``, ``rows``, ``heldout_rows``, ``tokens_per_epoch``, ``tokens``
        (of the whole run, estimated from the epochs), ``padding`` (its share of what the first epoch's batches hold;
        None for rows without tokens), ``steps``, ``steps_per_epoch``, ``warmup_steps``,
        ``first_step``, ``total_parameters``, the adapter's facts, ``adapter_mb`` (10^6 bytes), ``memory`` (see
        :meth:`qmemtune.engine.memory.estimate.Estimate.as_dict`; None where there is no estimate), ``data``,
        ``warnings``.

    Raises:
        UserError: what would stop the run before its first step, as far as it can be known without the weights.
    """
    config = composed.config
    device = pick_device()
    checked = preflight(config, device=device)
    opened, rows, steps, adapter = checked.opened, checked.rows, checked.steps, checked.adapter
    memory = checked.memory
    return {
        "run_dir": str(opened.run.path),
        "model": config.model.path,
        "quantization": config.quantization.kind,
        "device": str(device),
        "dtype": str(checked.dtype).removeprefix("torch."),
        "rows": len(rows.train),
        "heldout_rows": len(rows.prepared.heldout),
        "tokens_per_epoch": rows.prepared.tokens,
        "tokens": round(rows.prepared.tokens * steps.total / steps.per_epoch),
        "padding": None
        if isinstance(rows.train, TensorRows)
        else round(padding_share(rows.train.lengths, config, checked.form, 1), 4),
        "steps": steps.total,
        "steps_per_epoch": steps.per_epoch,
        "warmup_steps": steps.warmup,
        "rows_per_step": steps.rows_per_step,
        "first_step": opened.checkpoint.step if opened.checkpoint else 0,
        "total_parameters": checked.total_parameters,
        **adapter,
        "adapter_mb": round(adapter["trainable_parameters"] * TRAINED_ITEMSIZE / 1e6, 3),
        "memory": memory.estimate.as_dict() if memory else None,
        "data": rows.prepared.as_dict(),
        "warnings": [*composed.warnings, *checked.notes, *rows.prepared.warnings],
    }


def adapter_facts(config: Config) -> tuple[int, dict[str, Any]]:
    """Parameters of the base model, and the facts of :func:`qmemtune.adapters.describe`; loads no weights."""
    base = base_skeleton(config)
    total = sum(parameter.numel() for parameter in base.parameters())
    return total, describe(adapted_skeleton(config, base))
