"""Translates a config into Trainer's arguments."""

from __future__ import annotations

import os
import sys

import torch
from transformers import TrainingArguments

from qmemtune.config.schema import Config
from qmemtune.engine.steps import StepCount
from qmemtune.errors import UserError
from qmemtune.rundir import RunDir

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""Our names of optimizers, and Trainer's."""
FUSED_OPTIMIZERS = {"adamw": "adamw_torch_fused"}
"""The same on a GPU, where they differ."""


def launched() -> bool:
    """Whether torchrun or accelerate launch started this process."""
    return "LOCAL_RANK" in os.environ


def refuse_data_parallel() -> None:
    """Several GPUs in one process make Trainer use DataParallel, which copies the model in every step: refuse.

    Raises:
        UserError: this process sees several GPUs and no launcher started it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1 and not launched():
        raise UserError(
            f"{count} GPUs are visible, but this is one process",
            where="CUDA_VISIBLE_DEVICES",
            fix=f"start one process a GPU (torchrun --nproc-per-node {count} -m qmemtune train ...), "
            "or use one GPU with CUDA_VISIBLE_DEVICES=0",
        )


def training_arguments(config: Config, *, device: torch.device, dtype: torch.dtype) -> TrainingArguments:
    """Trainer's arguments for a run. Making them joins the process group, if a launcher started this process.

    The folder of checkpoints and the number of steps are not known yet: see :func:`settle`.

    Logging, evaluation and saving follow :class:`qmemtune.engine.rhythm.Rhythm`, so Trainer's own intervals are off;
    gradient checkpointing is switched on at the model.

    Args:
        config: the run.
        device: what to train on; "cpu" keeps Trainer off a GPU.
        dtype: of the arithmetic; adapter weights stay float32.
    """
    trainer, optimizer = config.trainer, config.optimizer
    assert not trainer.gradient_checkpointing_use_reentrant or config.adapter.kind != "queryable"
    return TrainingArguments(
        output_dir="unsettled",
        num_train_epochs=trainer.num_train_epochs,
        per_device_train_batch_size=trainer.per_device_train_batch_size,
        gradient_accumulation_steps=trainer.gradient_accumulation_steps,
        max_grad_norm=trainer.max_grad_norm,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        # One kernel for all parameters, where the plain form reads a number of each from the GPU's host.
        optim=(OPTIMIZERS | FUSED_OPTIMIZERS if device.type == "cuda" else OPTIMIZERS)[optimizer.name],
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=optimizer.warmup_steps,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        full_determinism=trainer.deterministic,
        dataloader_num_workers=trainer.num_workers,
        # Forked ones leave signals to the main process, see qmemtune.engine.interrupt.
        dataloader_multiprocessing_context="fork" if trainer.num_workers and sys.platform == "linux" else None,
        # A worker that lives on would keep the first epoch's order.
        dataloader_persistent_workers=False,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        # Rotation counts complete checkpoints only, see qmemtune.engine.checkpoints.
        save_total_limit=None,
        restore_callback_states_from_checkpoint=False,
        disable_tqdm=True,
        log_level="passive" if os.environ.get("TRANSFORMERS_VERBOSITY") else "error",
        report_to=list(config.tracking.backends) or "none",
        run_name=config.tracking.name,
        project=config.tracking.project,
        label_names=["labels"],
    )


def settle(args: TrainingArguments, run: RunDir, steps: StepCount) -> None:
    """Fill in what is known only when the run folder is chosen and the rows are counted."""
    args.output_dir = str(run.checkpoints)
    args.max_steps = steps.total
    args.run_name = args.run_name or run.path.name
