"""What `qmemtune eval` measures: a tuned model beside its base, or a model by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from qmemtune.adapters.initialisation import changes_base
from qmemtune.config.evaluation import EvaluationConfig
from qmemtune.credentials import hide
from qmemtune.errors import first_line
from qmemtune.evaluation.evaluate import EvalProgress, EvalResult, evaluate
from qmemtune.evaluation.exact_match import RowMatch
from qmemtune.evaluation.forward import Instructions
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.harness import check_tasks, run_tasks
from qmemtune.evaluation.samples import evenly_spaced
from qmemtune.evaluation.summary import differences
from qmemtune.models.hardware import autocast


@dataclass(frozen=True)
class Measured:
    """What was measured of one model."""

    result: EvalResult
    tasks: dict[str, Any]
    """What :func:`task_results` found."""

    def as_dict(self) -> dict[str, Any]:
        """The result's numbers with those of the tasks."""
        return self.result.as_dict() | self.tasks


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    *,
    source: Instructions | None = None,
    device: torch.device,
    dtype: torch.dtype,
    progress: EvalProgress | None = None,
) -> Measured:
    """One model on held-out rows, and on the tasks that the config names.

    Raises:
        UserError: a task is not known, or cannot be run here; nothing has been measured then.
    """
    check_tasks(config.tasks)
    result = evaluate(
        model,
        tokenizer,
        rows,
        config,
        source=source,
        device=device,
        dtype=dtype,
        exact_match=config.exact_match.enabled,
        progress=progress,
    )
    return Measured(result, task_results(model, tokenizer, config, device, dtype))


def evaluate_pair(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    *,
    source: Instructions | None = None,
    device: torch.device,
    dtype: torch.dtype,
    fresh_base: Callable[[], nn.Module] | None = None,
    progress: EvalProgress | None = None,
) -> dict[str, Any]:
    """The model with its adapter and without it, on the same rows; the report is :func:`side_by_side`'s.

    Args:
        fresh_base: loads the base: needed where the adapter's initialisation has changed the one that it is on.

    Raises:
        ValueError: it is needed and not given.
    """
    changed = changes_base(model.peft_config[model.active_adapter])
    if changed and fresh_base is None:
        raise ValueError("without this adapter the model is not its base: fresh_base is needed")
    measured: dict[str, Measured] = {}
    for name in ("base", "tuned"):
        of_base = name == "base"
        subject = fresh_base() if of_base and changed and fresh_base is not None else model
        # The outer guard: switching an adapter off and on again touches its parameters' requires_grad.
        with undisturbed(model), model.disable_adapter() if of_base else nullcontext():
            measured[name] = measure(
                subject,
                tokenizer,
                rows,
                config,
                source=None if of_base else source,
                device=device,
                dtype=dtype,
                progress=prefixed(progress, name),
            )
    return side_by_side(measured["base"], measured["tuned"], rows, config, tokenizer)


def side_by_side(
    base: Measured,
    tuned: Measured,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Two models that were measured on the same rows.

    Returns:
        ``base`` and ``tuned`` (as of :meth:`EvalResult.as_dict`, with ``tasks`` if the config names any),
        ``difference`` (tuned minus base, paired by row, with 95 % intervals, also by group), ``examples`` (a few
        answers of both, if exact match was measured) and ``rows``.
    """
    first, second = base.result, tuned.result
    report: dict[str, Any] = {
        "base": base.as_dict(),
        "tuned": tuned.as_dict(),
        "difference": differences((first.losses, first.matches), (second.losses, second.matches)),
        "rows": len(first.losses),
    }
    if first.matches and second.matches:
        report["examples"] = examples(rows, config, tokenizer, {"base": first.matches, "tuned": second.matches})
    return report


def by_itself(
    measured: Measured,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """A model without a base beside it.

    Returns:
        ``base`` (None), ``tuned`` (as of :meth:`EvalResult.as_dict`, with ``tasks`` if the config names any), ``rows``
        and ``examples`` (if exact match was measured).
    """
    result = measured.result
    report: dict[str, Any] = {"base": None, "tuned": measured.as_dict(), "rows": len(result.losses)}
    if result.matches:
        report["examples"] = examples(rows, config, tokenizer, {"output": result.matches})
    return report


def task_results(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """``{"tasks": ...}`` of the harness tasks that the config names; empty if it names none.

    Where the harness fails, each task has an ``error`` in place of its metrics.
    """
    if not config.tasks:
        return {}
    try:
        found = run_tasks(
            model,
            tokenizer,
            config.tasks,
            limit=config.tasks_limit,
            batch_size=config.per_device_eval_batch_size,
            autocast=partial(autocast, device, dtype),
        )
    except Exception as error:  # noqa: BLE001 - tasks download and run code of others: what was measured before stays
        reason = hide(f"{type(error).__name__}: {first_line(error)}")
        return {"tasks": {task: {"error": reason} for task in config.tasks}}
    return {"tasks": found}


def examples(
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
    matches: Mapping[str, Sequence[RowMatch]],
) -> list[dict[str, str]]:
    """``config.samples.count`` rows with ``prompt``, ``expected`` and each model's whole output under its name."""
    measured = evenly_spaced(rows, config.exact_match.max_rows)
    found = []
    for row, *answers in zip(measured, *matches.values(), strict=True):
        prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
        outputs = {name: answer.output for name, answer in zip(matches, answers, strict=True)}
        found.append({"prompt": prompt, "expected": answers[0].expected} | outputs)
    return evenly_spaced(found, config.samples.count)


def prefixed(progress: EvalProgress | None, name: str) -> EvalProgress | None:
    """Progress that says which model is being measured."""
    if progress is None:
        return None
    return lambda what, done, total: progress(f"{name}: {what}", done, total)
