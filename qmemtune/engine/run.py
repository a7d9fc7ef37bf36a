"""One training run, from a composed config to a run folder."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments

from qmemtune.adapters import describe
from qmemtune.config.compose import Composed
from qmemtune.config.dump import to_yaml
from qmemtune.config.schema import Config
from qmemtune.data.collate import Collator
from qmemtune.data.prepare import PreparedData
from qmemtune.data.sampler import LengthGroupedSampler
from qmemtune.engine import checkpoints
from qmemtune.engine.arguments import refuse_data_parallel, settle, training_arguments
from qmemtune.engine.best import Best
from qmemtune.engine.environment import describe_environment, peak_rss_mib, seconds_since_start
from qmemtune.engine.folder import Opened, open_run, resume_command
from qmemtune.engine.heldout import HeldOut
from qmemtune.engine.interrupt import Interrupted, StopRequest, listening
from qmemtune.engine.metrics_log import JsonLines, plain
from qmemtune.engine.parallel import from_first
from qmemtune.engine.progress import Progress, SilentProgress
from qmemtune.engine.resume import check_resumable
from qmemtune.engine.sampler import SeededRandomSampler
from qmemtune.engine.setup import Materials, build
from qmemtune.engine.steps import StepCount, count_steps
from qmemtune.engine.totals import Totals
from qmemtune.engine.tracking import check_backends, use_folder
from qmemtune.engine.trainer import Parts, RunTrainer
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.rundir import RunDir, write_json


def train(composed: Composed, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train an adapter and write the run folder.

    Args:
        composed: the run's config.
        progress: is told what happens; in the first process only.

    Returns:
        The summary that summary.json holds.

    Raises:
        UserError: something in the config, the data or the checkpoint to resume cannot be used.
        RunFailed: the loss is not a number.
        Interrupted: a signal stopped the run; a checkpoint is saved.
    """
    config = composed.config
    refuse_data_parallel()
    check_backends(config.tracking)
    device = pick_device()
    dtype = compute_dtype(config.model.compute_dtype, device)
    args = training_arguments(config, device=device, dtype=dtype)
    first = args.process_index == 0
    if progress is None or not first:
        progress = SilentProgress()
    opened = from_first(lambda: open_run(config), args)
    run = opened.run
    for note in opened.notes:
        progress.message(note)
    if first:
        open_folder(opened, composed, args)
    materials = build(config, args, device=args.device, rejected=run.rejected if first else None)
    if first:
        run.config.write_text(to_yaml(with_form(config, materials.data)), encoding="utf-8")
    for line in materials.data.report.lines():
        progress.message(line)
    steps = count_steps(len(materials.data.train), config.trainer, config.optimizer, world_size=args.world_size)
    settle(args, run, steps)
    use_folder(config.tracking, run)
    with listening() as stop:
        trainer = make_trainer(config, args, materials, run, steps, progress, stop, opened)
        progress.start(
            steps.total,
            {
                "run_dir": str(run.path),
                "first_step": opened.checkpoint.step if opened.checkpoint else 0,
                "device": str(args.device),
                "dtype": str(dtype).removeprefix("torch."),
                "rows": len(materials.data.train),
                "total_parameters": sum(p.numel() for p in materials.model.parameters()),
                **describe(materials.model),
            },
        )
        try:
            go(trainer, materials, opened)
        finally:
            progress.finish()
        if trainer.interrupted:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {steps.total}; the checkpoint is saved",
                where=str(run.path),
                fix=f"go on with: {resume_command(sys.argv, run)}",
                signum=stop.signum or 15,
            )
    save_adapter(trainer, materials, run)
    summary = summarise(trainer, materials, run)
    if first:
        write_json(run.summary, summary)
    if args.world_size > 1:
        torch.distributed.destroy_process_group()
    return summary


def open_folder(opened: Opened, composed: Composed, args: TrainingArguments) -> None:
    """Write what is known before training, and remove what does not belong to the run that now starts."""
    run = opened.run
    run.path.mkdir(parents=True, exist_ok=True)
    run.summary.unlink(missing_ok=True)
    run.config.write_text(to_yaml(composed.config), encoding="utf-8")
    write_json(run.environment, describe_environment(seed=composed.config.seed, world_size=args.world_size))
    step = -1 if opened.checkpoint is None else opened.checkpoint.step
    for path in (run.metrics, run.samples):
        JsonLines(path).truncate(step)
    run.checkpoints.mkdir(exist_ok=True)
    checkpoints.remove_later(run.checkpoints, step)


def with_form(config: Config, data: PreparedData) -> Config:
    """The config with the row form that was recognised, so that prompts are rendered alike without the rows."""
    forms = {source.form for source in data.report.sources}
    if config.data.format != "auto" or forms != {data.format}:
        # Training and held-out rows of different forms: each has to be recognised again.
        return config
    form = cast(Literal["alpaca", "prompt_completion", "messages"], data.format)
    return replace(config, data=replace(config.data, format=form))


def make_trainer(
    config: Config,
    args: TrainingArguments,
    materials: Materials,
    run: RunDir,
    steps: StepCount,
    progress: Progress,
    stop: StopRequest,
    opened: Opened,
) -> RunTrainer:
    """Put the trainer together; with a checkpoint, after checking that it fits."""
    rows, tokenizer = materials.data.train, materials.tokenizer
    first = args.process_index == 0
    totals, best = Totals(), Best(config.trainer.keep_best)
    if opened.checkpoint is not None:
        check_resumable(
            opened.checkpoint,
            materials.model,
            world_size=args.world_size,
            rows_per_step=steps.rows_per_step,
            sharded=is_sharded(args),
        )
        totals = Totals.load(opened.checkpoint.path)
        best = Best.load(opened.checkpoint.path, keep_weights=config.trainer.keep_best)
    sampler: Sampler[int] = SeededRandomSampler(len(rows), config.seed)
    if config.trainer.length_grouping:
        sampler = LengthGroupedSampler(rows.lengths, args.per_device_train_batch_size * args.world_size, config.seed)
    heldout = HeldOut(
        rows=materials.data.heldout,
        tokenizer=tokenizer,
        config=config.evaluation,
        source=materials.source,
        device=args.device,
        dtype=compute_dtype(config.model.compute_dtype, args.device),
        samples=JsonLines(run.samples, enabled=first),
        stop=stop,
        world_size=args.world_size,
    )
    parts = Parts(
        config=config,
        sampler=sampler,
        source=materials.source,
        heldout=heldout,
        steps=steps,
        metrics=JsonLines(run.metrics, enabled=first),
        progress=progress,
        stop=stop,
        totals=totals,
        best=best,
    )
    return RunTrainer(materials.model, args, Collator(tokenizer.pad_token_id), rows, parts)


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed hold the weights and write checkpoints in their own way."""
    return bool(args.fsdp or args.deepspeed) or any(
        os.environ.get(name, "").lower() == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )


def go(trainer: RunTrainer, materials: Materials, opened: Opened) -> None:
    """Train, or, when the checkpoint holds the last step already, only load it and finish."""
    if opened.checkpoint is None:
        trainer.train()
    elif opened.checkpoint.step < trainer.parts.steps.total:
        trainer.train(resume_from_checkpoint=str(opened.checkpoint.path))
    else:
        trainer.parts.progress.message(
            f"all {trainer.parts.steps.total} steps are done already: nothing is trained "
            "(a larger trainer.max_steps or trainer.num_train_epochs goes on)"
        )
        model = materials.model
        model.load_adapter(str(opened.checkpoint.path), model.active_adapters[0], is_trainable=True)
        trainer.state.global_step = opened.checkpoint.step
        trainer.finish()


def save_adapter(trainer: RunTrainer, materials: Materials, run: RunDir) -> None:
    """Write the final adapter and the tokenizer; a reader sees the old folder or the whole new one."""
    beside = run.adapter.with_name(run.adapter.name + ".tmp")
    trainer.save_model(str(beside), _internal_call=True)
    if trainer.args.should_save:
        (beside / "training_args.bin").unlink(missing_ok=True)
        materials.tokenizer.save_pretrained(beside)
        shutil.rmtree(run.adapter, ignore_errors=True)
        Path(beside).rename(run.adapter)
    trainer.accelerator.wait_for_everyone()


def summarise(trainer: RunTrainer, materials: Materials, run: RunDir) -> dict[str, Any]:
    """What ``train`` reports."""
    totals, first_step = trainer.parts.totals, trainer.first_step_done_s
    return plain(
        {
            "run_dir": str(run.path),
            "steps": trainer.state.global_step,
            "train_loss": totals.train_loss,
            "eval": trainer.final_metrics,
            **{k: v for k, v in describe(materials.model).items() if k != "kind"},
            "adapter_kind": describe(materials.model)["kind"],
            "tokens": totals.run.tokens,
            "tokens_per_s": totals.tokens_per_s,
            "step_s_median": totals.step_s_median,
            "first_step_done_s": first_step,
            "total_s": round(seconds_since_start(), 3),
            "peak_rss_mib": round(peak_rss_mib(), 1),
            "stopped_early": trainer.stopped_early,
            "router_collapsed_at_step": trainer.router.collapsed_at_step,
            "best_step": trainer.parts.best.step,
            "best_loss": trainer.parts.best.loss,
            "final_step": trainer.final_step,
            "adapter": str(run.adapter),
            "device": str(trainer.args.device),
            "data": materials.data.report.as_dict(),
        }
    )
