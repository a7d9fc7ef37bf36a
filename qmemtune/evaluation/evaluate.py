"""One evaluation of one model: held-out loss, and exact match where asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qmemtune.config.evaluation import EvaluationConfig
from qmemtune.errors import UserError
from qmemtune.evaluation.exact_match import RowMatch, row_matches
from qmemtune.evaluation.forward import Instructions
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import RowLoss, row_losses
from qmemtune.evaluation.samples import Sample, evenly_spaced, sample_answers
from qmemtune.evaluation.summary import summarise
from qmemtune.models.hardware import autocast

EvalProgress = Callable[[str, int, int], None]
"""Called with what is being measured, the rows done and the rows in all."""


@dataclass(frozen=True)
class EvalResult:
    """What was measured, row by row."""

    losses: list[RowLoss]
    matches: list[RowMatch] | None
    """None where exact match was not measured."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """``loss``, ``perplexity``, ``exact_match`` if measured, ``rows``, ``tokens``, ``groups``, ``seconds``."""
        return summarise(self.losses, self.matches) | {"seconds": round(self.seconds, 3)}


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    *,
    source: Instructions | None = None,
    device: torch.device,
    dtype: torch.dtype,
    exact_match: bool,
    loss: bool = True,
    progress: EvalProgress | None = None,
) -> EvalResult:
    """Measure a model on held-out rows, and leave it exactly as it was.

    Args:
        rows: held-out rows with ``input_ids``, ``labels``, ``prompt_ids``, ``answer``, ``instruction``, ``group``.
        source: gives the rows' instructions to the adapter; None for a model without one.
        device: where the model is; with ``dtype`` it decides on autocast.
        dtype: compute dtype.
        exact_match: also generate answers and compare (whatever ``config.exact_match.enabled`` says).
        loss: measure the loss; off where only exact match is due.
        progress: told about rows done.

    Raises:
        UserError: there are no held-out rows, or the answer pattern is of no use.
    """
    if len(rows) == 0:
        raise UserError(
            "there are no held-out rows to evaluate on",
            where="data.eval_path",
            fix="give data.eval_path, or a data.eval_fraction above 0",
        )
    begun = time.perf_counter()
    cast = partial(autocast, device, dtype)
    losses: list[RowLoss] = []
    matches: list[RowMatch] | None = None
    with undisturbed(model):
        if loss:
            chosen = evenly_spaced(rows, config.max_rows)
            losses = row_losses(
                model,
                chosen,
                pad_token_id=padding(tokenizer),
                batch_size=config.per_device_eval_batch_size,
                source=source,
                autocast=cast,
                progress=told(progress, "loss", len(chosen)),
            )
        if exact_match:
            chosen = evenly_spaced(rows, config.exact_match.max_rows)
            matches = row_matches(
                model,
                tokenizer,
                chosen,
                config.exact_match,
                batch_size=config.per_device_eval_batch_size,
                source=source,
                autocast=cast,
                progress=told(progress, "exact match", len(chosen)),
            )
    return EvalResult(losses, matches, time.perf_counter() - begun)


def draw_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: EvaluationConfig,
    *,
    source: Instructions | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Sample]:
    """A few generated answers (``config.samples``); the model is left as it was."""
    with undisturbed(model):
        return sample_answers(
            model,
            tokenizer,
            rows,
            config.samples,
            batch_size=config.per_device_eval_batch_size,
            source=source,
            autocast=partial(autocast, device, dtype),
        )


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows; any token would do, as padding is masked."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def told(progress: EvalProgress | None, what: str, total: int) -> Callable[[int], None] | None:
    """The progress of one metric."""
    if progress is None:
        return None
    return lambda done: progress(what, done, total)
