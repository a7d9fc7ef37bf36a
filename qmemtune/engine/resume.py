"""Checks that a checkpoint and the run that goes on from it belong together."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel

from qmemtune.engine.checkpoints import require_files
from qmemtune.engine.manifest import Checkpoint
from qmemtune.errors import Finding, UserError

NOT_COMPARED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "prior_progress",
    "revision",
}
"""Entries of an adapter's config that may differ without changing what is trained."""


def check_resumable(
    checkpoint: Checkpoint, model: PeftModel, *, world_size: int, rows_per_step: int, sharded: bool
) -> None:
    """Refuse a checkpoint from which training would go on differently than it began.

    Args:
        checkpoint: where to go on from.
        model: the adapted model of this run.
        world_size: processes of this run.
        rows_per_step: training rows of one optimizer step of this run.
        sharded: FSDP or DeepSpeed write their own files in place of Trainer's.

    Raises:
        UserError: with everything that is missing or differs.
    """
    require_files(checkpoint, sharded=sharded)
    findings = []
    if checkpoint.world_size != world_size:
        findings.append(
            Finding(
                f"the checkpoint was written by {checkpoint.world_size} processes, this run has {world_size}",
                str(checkpoint.path),
                f"start {checkpoint.world_size} processes, as before",
            )
        )
    elif checkpoint.rows_per_step != rows_per_step:
        findings.append(
            Finding(
                f"a step of the checkpoint's run has {checkpoint.rows_per_step} rows, one of this run {rows_per_step}",
                str(checkpoint.path),
                "use the same trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps as before",
            )
        )
    current = model.peft_config[model.active_adapters[0]].to_dict()
    # Read as PEFT reads it: an older adapter does not name later options, and is not as they are by default now.
    for name, stored in PeftConfig.from_pretrained(str(checkpoint.path)).to_dict().items():
        if name in current and name not in NOT_COMPARED and comparable(stored) != comparable(current[name]):
            findings.append(
                Finding(
                    f"the checkpoint's adapter has {name}={stored!r}, this run's {current[name]!r}",
                    str(checkpoint.path),
                    "give the same adapter options as before, or start a new run",
                )
            )
    if findings:
        raise UserError.many(findings)


def comparable(value: Any) -> Any:
    """A config entry as JSON would bring it back; PEFT keeps some lists as sets."""
    if isinstance(value, set | frozenset | list | tuple):
        return sorted(str(item) for item in value)
    if isinstance(value, dict):
        return {str(key): comparable(item) for key, item in value.items()}
    return getattr(value, "value", value)
