"""Benchmark tasks, through EleutherAI's lm-evaluation-harness (the extra ``eval``)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qmemtune.errors import UserError
from qmemtune.evaluation.forward import Autocast
from qmemtune.evaluation.guard import undisturbed

WHERE = "evaluation.tasks"


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    autocast: Autocast = nullcontext,
) -> dict[str, dict[str, float | int]]:
    """Run harness tasks on a live model, with its adapter if it has one, and leave it as it was.

    Task prompts carry no instruction text, so an instruction prior is off.

    Args:
        tasks: names of the harness's tasks or groups, or local folders of task YAML files (all tasks in them run).
        limit: documents of each task; None for all.
        batch_size: rows in one forward pass.

    Returns:
        For each task (and group) its metrics by name, standard errors as ``<metric>_stderr``, and ``n`` documents.

    Raises:
        UserError: the harness is not installed, or there is no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"benchmark tasks need lm-evaluation-harness, which cannot be imported ({error})",
            where=WHERE,
            fix="pip install 'qmemtune[eval]', or leave evaluation.tasks empty",
        ) from None
    names, manager = find_tasks(tasks)
    with undisturbed(model), autocast():
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    counts = results.get("n-samples", {})
    return {
        task: task_metrics(metrics) | ({"n": counts[task]["effective"]} if task in counts else {})
        for task, metrics in results["results"].items()
    }


def find_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Names of the tasks and the harness's task manager that knows them.

    Raises:
        UserError: a folder holds no task, or a name is unknown.
    """
    from lm_eval.tasks import TaskManager

    folders = [task for task in tasks if Path(task).is_dir()]
    named = [task for task in tasks if task not in folders]
    names: list[str] = []
    for folder in folders:
        found = TaskManager(include_path=folder, include_defaults=False).all_subtasks
        if not found:
            raise UserError("the folder holds no harness task", where=f"{WHERE}: {folder}", fix="a task is a YAML file")
        names += found
    # Reading the thousands of tasks that come with the harness takes seconds: only if one is asked for.
    manager = TaskManager(include_path=folders or None, include_defaults=bool(named))
    for name in named:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UserError(
                f"lm-evaluation-harness knows no task {name!r}",
                where=WHERE,
                fix=f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them",
            )
    return names + named, manager


def task_metrics(metrics: dict[str, Any]) -> dict[str, float | int]:
    """Numbers of one task: the harness's ``acc,none`` is ``acc`` here, ``acc,strict`` is ``acc (strict)``."""
    result: dict[str, float | int] = {}
    for key, value in metrics.items():
        if isinstance(value, int | float):
            name, _, variant = key.partition(",")
            result[name if variant in ("", "none") else f"{name} ({variant})"] = value
    return result
