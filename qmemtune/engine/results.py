"""What a run ends with: its adapter, and the summary of what happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qmemtune.adapters import describe
from qmemtune.engine.environment import peak_gpu_mib, peak_rss_mib, seconds_since_start
from qmemtune.engine.memory.fit import Memory
from qmemtune.engine.metrics_log import plain
from qmemtune.engine.task import Task
from qmemtune.engine.trainer import RunTrainer
from qmemtune.rundir import ADAPTER_FORMAT, RunDir, write_format, write_json


def write_results(trainer: RunTrainer, task: Task, run: RunDir, memory: Memory | None) -> dict[str, Any]:
    """Write adapter and summary.

    Returns:
        The summary.

    Raises:
        RunFailed: something that the run was to write is missing, these or anything before.
    """
    unwritten = trainer.parts.unwritten
    with unwritten.instead("adapter"):
        save_adapter(trainer, task, run)
    trainer.accelerator.wait_for_everyone()
    summary = summarise(trainer, task, run, memory)
    if trainer.args.process_index == 0 and "adapter" not in unwritten.reasons:
        with unwritten.instead(run.summary.name):
            write_json(run.summary, summary)
    unwritten.report()
    return summary


def save_adapter(trainer: RunTrainer, task: Task, run: RunDir) -> None:
    """Write the final adapter and the tokenizer, if there is one; a reader sees the old folder or the whole new one."""
    beside = run.adapter.with_name(run.adapter.name + ".tmp")
    if trainer.args.should_save:
        # What a killed process left of it, safetensors' own unfinished file above all.
        shutil.rmtree(beside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(beside), _internal_call=True)
        if trainer.args.should_save:
            (beside / "training_args.bin").unlink(missing_ok=True)
            task.save_beside(beside)
            write_format(beside, ADAPTER_FORMAT)
            shutil.rmtree(run.adapter, ignore_errors=True)
            Path(beside).rename(run.adapter)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(beside, ignore_errors=True)


def summarise(trainer: RunTrainer, task: Task, run: RunDir, memory: Memory | None) -> dict[str, Any]:
    """What ``train`` reports."""
    totals, first_step = trainer.parts.totals, trainer.first_step_done_s
    return plain(
        {
            "run_dir": str(run.path),
            "steps": trainer.state.global_step,
            "train_loss": totals.train_loss,
            "eval": trainer.evaluations.final_metrics,
            **{k: v for k, v in describe(task.model).items() if k != "kind"},
            "adapter_kind": describe(task.model)["kind"],
            "tokens": totals.run.tokens,
            "tokens_per_s": totals.tokens_per_s,
            "step_s_median": totals.step_s_median,
            "first_step_done_s": first_step,
            "total_s": round(seconds_since_start(), 3),
            "peak_rss_mib": round(peak_rss_mib(), 1),
            "peak_gpu_mib": peak_gpu_mib(),
            "memory_estimate": memory.estimate.as_dict() if memory else None,
            "stopped_early": trainer.evaluations.stopped_early,
            "not_written": trainer.parts.unwritten.missing(),
            "skipped_steps": totals.skipped_steps,
            "loss_spikes": totals.loss_spikes,
            "router_collapsed_at_step": totals.router_collapsed_at_step,
            "best_step": trainer.parts.best.step,
            "best_loss": trainer.parts.best.loss,
            "final_step": trainer.evaluations.final_step,
            "adapter": str(run.adapter),
            "device": str(trainer.args.device),
            "data": task.report.as_dict(),
        }
    )
