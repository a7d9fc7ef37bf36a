"""From per-row results to the numbers that are shown and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from qmemtune.evaluation.exact_match import RowMatch
from qmemtune.evaluation.loss import RowLoss
from qmemtune.evaluation.paired import paired_difference

NO_GROUP = "(no group)"
Row = TypeVar("Row", RowLoss, RowMatch)
Rows = tuple[Sequence[RowLoss], Sequence[RowMatch] | None]
"""One model's results: the loss of each row, and the matches if they were measured."""


def summarise(losses: Sequence[RowLoss], matches: Sequence[RowMatch] | None = None) -> dict[str, Any]:
    """``loss`` (nats per token, over all tokens), ``perplexity``, ``row_accuracy`` (share of rows whose every labelled
    token is the most likely one, given the right ones before it), ``rows``, ``tokens``, and as far as there are any
    ``exact_match`` with ``exact_match_rows``, ``exact_match_cut`` (wrong answers that reached the longest length) and
    ``exact_match_without_answer`` (those in which the answer pattern finds nothing), and ``groups``: the same for each
    group.

    A loss or perplexity that is not a finite number is None, so that the result is JSON.
    """
    result = summarise_flat(losses, matches)
    names = group_names(losses, matches)
    if names:
        result["groups"] = {
            name: summarise_flat(of_group(losses, name), of_group(matches or (), name)) for name in names
        }
    return result


def differences(base: Rows, tuned: Rows) -> dict[str, Any]:
    """Tuned minus base, paired by row: ``loss`` and ``exact_match`` (see :func:`paired_difference`), and ``groups``."""
    result = differences_flat(base, tuned)
    names = group_names(*base)
    if names:
        result["groups"] = {
            name: differences_flat(rows_of_group(base, name), rows_of_group(tuned, name)) for name in names
        }
    return result


def summarise_flat(losses: Sequence[RowLoss], matches: Sequence[RowMatch] | None) -> dict[str, Any]:
    """The same without groups."""
    tokens = sum(row.tokens for row in losses)
    loss = sum(row.loss_sum for row in losses) / tokens if tokens else math.nan
    result: dict[str, Any] = {"loss": finite(loss), "perplexity": finite(perplexity(loss))}
    labelled = [row for row in losses if row.tokens]
    if labelled:
        result["row_accuracy"] = sum(row.mistaken == 0 for row in labelled) / len(labelled)
    if matches:
        result["exact_match"] = sum(row.correct for row in matches) / len(matches)
        result["exact_match_rows"] = len(matches)
        result["exact_match_cut"] = sum(row.cut and not row.correct for row in matches)
        result["exact_match_without_answer"] = sum(not row.found for row in matches)
    return result | {"rows": len(losses), "tokens": tokens}


def differences_flat(base: Rows, tuned: Rows) -> dict[str, Any]:
    """The same without groups."""
    result: dict[str, Any] = {
        "loss": paired_difference(
            [row.loss_sum for row in base[0]],
            [row.loss_sum for row in tuned[0]],
            [row.tokens for row in base[0]],
        )
    }
    if base[1] and tuned[1]:
        result["exact_match"] = paired_difference(
            [float(row.correct) for row in base[1]], [float(row.correct) for row in tuned[1]]
        )
    return result


def group_names(losses: Sequence[RowLoss], matches: Sequence[RowMatch] | None) -> list[str]:
    """Names of the groups, sorted; empty if no row has one."""
    names = {row.group for row in losses} | {row.group for row in matches or ()}
    return sorted(name or NO_GROUP for name in names) if names - {""} else []


def of_group(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of a group."""
    return [row for row in rows if (row.group or NO_GROUP) == name]


def rows_of_group(results: Rows, name: str) -> Rows:
    """One model's results on the rows of a group."""
    return of_group(results[0], name), of_group(results[1] or (), name)


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if not loss > 700 else math.inf


def finite(value: float) -> float | None:
    """The value, or None if JSON has no number for it."""
    return value if math.isfinite(value) else None
