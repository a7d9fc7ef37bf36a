"""How far an exported model is from the live one, measured on the same held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qmemtune.data.collate import Collator
from qmemtune.data.rows import IGNORED
from qmemtune.engine.restore import LoadedRun
from qmemtune.evaluation.exact_match import row_matches
from qmemtune.evaluation.forward import Instructions
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import label_logprobs, length_batches, to_device
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast


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
        ``loss_live`` and ``loss_exported`` (nats a token), ``kl_mean`` (mean KL(live || exported) over the next-token
        distributions, nats), ``rows``, ``tokens``. The three are ``None`` where there are no rows.
    """
    if not rows:
        return {"loss_live": None, "loss_exported": None, "kl_mean": None, "rows": 0, "tokens": 0}
    collate = Collator(live.tokenizer.pad_token_id)
    cast = partial(autocast, live.device, live.dtype)
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    with undisturbed(live.model), undisturbed(exported), dequantized_on_cpu(live.model), torch.no_grad():
        for indices in length_batches([len(row["input_ids"]) for row in rows], batch_size):
            batch = to_device(collate([dict(rows[i]) for i in indices]), live.device)
            labels = batch["labels"][:, 1:]
            targets = labels[labels != IGNORED]
            of_live = label_logprobs(live.model, batch, source=live.source, autocast=cast)
            of_exported = label_logprobs(exported, batch, source=source, autocast=cast)
            start = 0
            for p, q in zip(of_live, of_exported, strict=True):
                target = targets[start : start + len(p)]
                sums += torch.stack(
                    [
                        F.nll_loss(p, target, reduction="sum"),
                        F.nll_loss(q, target, reduction="sum"),
                        F.kl_div(q, p, reduction="sum", log_target=True),
                    ]
                ).cpu()
                start += len(p)
            tokens += len(targets)
    loss_live, loss_exported, kl = (sums / tokens).tolist()
    # Rounding can bring the sum of many tiny terms below zero, which a divergence never is.
    return {
        "loss_live": loss_live,
        "loss_exported": loss_exported,
        "kl_mean": max(kl, 0.0),
        "rows": len(rows),
        "tokens": tokens,
    }


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
