"""Benchmark tasks, through EleutherAI's lm-evaluation-harness (the extra ``eval``)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
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
    names, manager = find_tasks(tasks)
    simple_evaluate, HFLM = harness()
    with undisturbed(model), autocast():
        results = simple_evaluate(
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


def check_tasks(tasks: Sequence[str]) -> None:
    """Look for the tasks, if there are any: to be called before a model is loaded and measured.

    Raises:
        UserError: as of :func:`find_tasks`.
    """
    if tasks:
        find_tasks(tasks)


def find_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Names of the tasks and the harness's task manager that knows them; needs no model.

    A task written as a path is a folder, and so is a name that the harness does not know.

    Raises:
        UserError: the harness is not installed, a folder holds no task, or a name is unknown.
    """
    harness()
    folders = [task for task in tasks if is_path(task)]
    named = [task for task in tasks if task not in folders]
    manager = task_manager(folders, with_own=bool(named))
    unknown = [name for name in named if not manager.match_tasks([name])]
    for task in [*folders, *unknown]:
        if not folder_of(task).is_dir():
            raise no_such_task(task, manager)
    named = [name for name in named if name not in unknown]
    names: list[str] = []
    for folder in [*folders, *unknown]:
        found = task_manager([folder], with_own=False).all_subtasks
        if not found:
            raise UserError("the folder holds no harness task", where=f"{WHERE}: {folder}", fix="a task is a YAML file")
        names += found
    return names + named, task_manager([*folders, *unknown], with_own=bool(named))


def harness() -> tuple[Any, Any]:
    """The harness's function that runs tasks, and its class for a live model.

    Raises:
        UserError: it is not installed, or not whole.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"benchmark tasks need lm-evaluation-harness, which cannot be imported ({error})",
            where=WHERE,
            fix="pip install 'qmemtune[eval]', or leave evaluation.tasks empty",
        ) from None
    return simple_evaluate, HFLM


def is_path(task: str) -> bool:
    """Whether a task is written as a path: a folder of rows may have the name of a task."""
    return "/" in task or os.sep in task or task.startswith((".", "~"))


def folder_of(task: str) -> Path:
    return Path(os.path.expanduser(task)).absolute()


def no_such_task(task: str, manager: Any) -> UserError:
    if is_path(task):
        return UserError("there is no such folder of harness tasks", where=f"{WHERE}: {task}", fix="check the path")
    near = difflib.get_close_matches(task, manager.all_tasks, n=3)
    return UserError(
        f"lm-evaluation-harness knows no task {task!r}",
        where=WHERE,
        fix=f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them",
    )


def task_manager(folders: Sequence[str], *, with_own: bool) -> Any:
    """What knows the tasks of these folders, and the harness's own if they are asked for."""
    from lm_eval.tasks import TaskManager

    paths = [str(folder_of(folder)) for folder in folders]
    return with_own_tasks(tuple(paths)) if with_own else TaskManager(include_path=paths, include_defaults=False)


@cache
def with_own_tasks(paths: tuple[str, ...]) -> Any:
    # Kept: reading the thousands of tasks that come with the harness takes many seconds.
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths) or None, include_defaults=True)


def task_metrics(metrics: dict[str, Any]) -> dict[str, float | int]:
    """Numbers of one task: the harness's ``acc,none`` is ``acc`` here, ``acc,strict`` is ``acc (strict)``."""
    result: dict[str, float | int] = {}
    for key, value in metrics.items():
        if isinstance(value, int | float):
            name, _, variant = key.partition(",")
            result[name if variant in ("", "none") else f"{name} ({variant})"] = value
    return result
