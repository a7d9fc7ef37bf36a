"""How far an exported model is from the live one, measured on the same held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmemtune.config.export import ExportConfig
from qmemtune.data.collate import Collator
from qmemtune.data.rows import IGNORED
from qmemtune.engine.restore import LoadedRun
from qmemtune.evaluation.exact_match import row_matches
from qmemtune.evaluation.forward import Instructions
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import label_logprobs, length_batches, to_device
from qmemtune.evaluation.summary import perplexity
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast

FILE = "fidelity.json"


class Comparison:
    """Sums of the differences between two models, position by position."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._largest, self._tokens = 0.0, 0

    def add(self, live: Tensor, exported: Tensor, target: Tensor) -> None:
        """Take in some positions.

        Args:
            live: log-probabilities over the vocabulary, (n, V), fp32.
            exported: the other model's.
            target: the tokens that come next, (n,).
        """
        divergence = F.kl_div(exported, live, reduction="none", log_target=True).sum(dim=-1)
        self._largest = max(self._largest, divergence.max().item())
        self._tokens += len(target)
        self._sums += torch.stack(
            [
                F.nll_loss(live, target, reduction="sum"),
                F.nll_loss(exported, target, reduction="sum"),
                divergence.sum(),
                (live.argmax(dim=-1) == exported.argmax(dim=-1)).sum().float(),
            ]
        ).cpu()

    def result(self, rows: int) -> dict[str, Any]:
        """What :func:`fidelity` returns.

        Raises:
            ValueError: there were no positions.
        """
        if not self._tokens:
            raise ValueError("no labelled position to compare at")
        loss_live, loss_exported, kl, same = (self._sums / self._tokens).tolist()
        return {
            "loss_live": loss_live,
            "loss_exported": loss_exported,
            "perplexity_live": perplexity(loss_live),
            "perplexity_exported": perplexity(loss_exported),
            # Rounding can bring the sum of many tiny terms below zero, which a divergence never is.
            "kl_mean": max(kl, 0.0),
            "kl_max": self._largest,
            "same_token": same,
            "rows": rows,
            "tokens": self._tokens,
        }


def fidelity(
    live: LoadedRun,
    exported: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    *,
    source: Instructions | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compare two models at the labelled positions of some rows.

    Args:
        exported: the exported model as loaded back, on the live model's device.
        source: gives instructions to ``exported``, if it can use them.

    Returns:
        ``loss_live`` and ``loss_exported`` (nats a token), ``perplexity_live`` and ``perplexity_exported``, ``kl_mean``
        and ``kl_max`` (KL(live || exported) of the next-token distributions, nats), ``same_token`` (share of positions
        at which both hold the same token for the likeliest), ``rows``, ``tokens``.

    Raises:
        ValueError: there are no rows.
    """
    collate = Collator(live.tokenizer.pad_token_id)
    cast = partial(autocast, live.device, live.dtype)
    comparison = Comparison()
    with ExitStack() as stack:
        for model in (live.model, exported):
            stack.enter_context(undisturbed(model))
            stack.enter_context(dequantized_on_cpu(model))
        stack.enter_context(torch.no_grad())
        for indices in length_batches([len(row["input_ids"]) for row in rows], batch_size):
            batch = to_device(collate([dict(rows[i]) for i in indices]), live.device)
            labels = batch["labels"][:, 1:]
            targets = labels[labels != IGNORED]
            of_live = label_logprobs(live.model, batch, source=live.source, autocast=cast)
            of_exported = label_logprobs(exported, batch, source=source, autocast=cast)
            start = 0
            for p, q in zip(of_live, of_exported, strict=True):
                comparison.add(p, q, targets[start : start + len(p)])
                start += len(p)
    return comparison.result(len(rows))


def too_far(found: Mapping[str, Any], config: ExportConfig) -> list[str]:
    """What is further from the live model than the config allows, in words; nothing is fine."""
    reasons = []
    if not found["kl_mean"] <= config.max_kl:
        reasons.append(f"mean KL {found['kl_mean']:.3g} is above export.max_kl={config.max_kl:g}")
    increase = found["loss_exported"] - found["loss_live"]
    if not increase <= config.max_loss_increase:
        reasons.append(
            f"the held-out loss rises by {increase:.3g} ({found['loss_live']:.4f} to {found['loss_exported']:.4f}), "
            f"more than export.max_loss_increase={config.max_loss_increase:g}"
        )
    return reasons


def exact_matches(
    live: LoadedRun, exported: nn.Module, rows: Sequence[Mapping[str, Any]], *, source: Instructions | None = None
) -> dict[str, Any]:
    """Exact match of generated answers, live and exported, as the run's evaluation measures it.

    Returns:
        ``exact_match_live`` and ``exact_match_exported`` (shares of the rows) and ``exact_match_rows``.
    """
    config = live.config.evaluation
    shares = {}
    for name, model, instructions in ("live", live.model, live.source), ("exported", exported, source):
        with undisturbed(model):
            matches = row_matches(
                model,
                live.tokenizer,
                rows,
                config.exact_match,
                batch_size=config.per_device_eval_batch_size,
                source=instructions,
                autocast=partial(autocast, live.device, live.dtype),
            )
        shares[f"exact_match_{name}"] = sum(match.correct for match in matches) / len(matches)
    return {**shares, "exact_match_rows": len(rows)}
