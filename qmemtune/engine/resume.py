"""A checkpoint and the run that goes on from it: whether they belong together, and which settings hold."""

from __future__ import annotations

import re
from typing import Any

from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qmemtune.adapters.build import kind_of
from qmemtune.engine.checkpoints import require_files
from qmemtune.engine.manifest import Checkpoint
from qmemtune.errors import Finding, UserError
from qmemtune.models.tensor_files import read_header

NOT_COMPARED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "prior_progress",
    "revision",
}
"""Entries of an adapter's config that may differ without changing what is trained."""
LAYER = re.compile(r"(.*?\.\d+)\.")
"""A parameter's name up to the number of its layer."""
SETTINGS = ("lr", "weight_decay", "betas", "eps")
"""Entries of an optimizer's group that follow from the config; the others say how it computes, as its state needs."""


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
    if not findings and not sharded and (words := misfit(checkpoint, model)):
        findings.append(
            Finding(
                f"the checkpoint does not fit this run's model: {words}",
                str(checkpoint.path),
                "use the base model that the run began with (model.path), or start a new run",
            )
        )
    if findings:
        raise UserError.many(findings)


def misfit(checkpoint: Checkpoint, model: PeftModel) -> str | None:
    """What of a checkpoint's adapter has no place in a model, in words; None if nothing is found.

    PEFT's methods beside LoRA may store other tensors than they train: theirs are not looked at.
    """
    if kind_of(model) not in ("lora", "queryable"):
        return None
    adapter = model.active_adapters[0]
    trained = {
        name.replace(f".{adapter}", ""): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    stored = {entry.name: entry.shape for entry in read_header(checkpoint.path / "adapter_model.safetensors")[1]}
    for name, shape in stored.items():
        own = trained.get(name, shape)
        if own != shape:
            return f"{name} has the shape {list(shape)}, and {list(own)} in the model"
    layers = [{found[1] for name in names if (found := LAYER.match(name))} for names in (stored, trained)]
    if layers[0] == layers[1]:
        return None
    return f"it has weights for {len(layers[0])} layers, and the model's adapter is in {len(layers[1])}"


def comparable(value: Any) -> Any:
    """A config entry as JSON would bring it back; PEFT keeps some lists as sets."""
    if isinstance(value, set | frozenset | list | tuple):
        return sorted(str(item) for item in value)
    if isinstance(value, dict):
        return {str(key): comparable(item) for key, item in value.items()}
    return getattr(value, "value", value)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The :data:`SETTINGS` of each group of an optimizer that has just been made."""
    return [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]


def apply_settings(settings: list[dict[str, Any]], optimizer: Optimizer, scheduler: Any) -> None:
    """Let this run's settings hold where loading has brought back those of the run that wrote the checkpoint.

    With the same settings nothing changes, not even in the last bit.

    Args:
        settings: from :func:`settings_of`.
        optimizer: the same one, after its state was loaded.
        scheduler: of its learning rates, after its state was loaded; another than torch's LambdaLR (DeepSpeed may
            bring its own) keeps the rates that it has.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["lr"] for group in settings]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        scheduler._last_lr = list(rates)
    for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update({**own, "lr": rate, "initial_lr": own["lr"]})
