"""Exact match: does the generated answer equal the reference?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qmemtune.config.evaluation import ExactMatchConfig
from qmemtune.errors import UserError
from qmemtune.evaluation.decode import greedy_answers
from qmemtune.evaluation.forward import Autocast, Instructions


@dataclass(frozen=True)
class RowMatch:
    """One generated answer and what it should have been."""

    correct: bool
    output: str
    """The whole generated text."""
    expected: str
    """The reference answer, or the part of it that the answer pattern finds."""
    group: str = ""
    """The row's group; empty for none."""
    cut: bool = False
    """Whether the output was cut at the longest length."""
    found: bool = True
    """Whether the answer pattern finds anything in the output."""


def row_matches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: ExactMatchConfig,
    *,
    batch_size: int,
    source: Instructions | None = None,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
) -> list[RowMatch]:
    """Generate an answer to each row and compare, in the order of ``rows``.

    Args:
        rows: dicts with ``prompt_ids``, ``answer`` and optionally ``instruction`` and ``group``.
        batch_size: rows in one batch of ordinary length (see :func:`greedy_answers`).

    Raises:
        UserError: the answer pattern is no regular expression, or finds nothing in any reference.
    """
    pattern = compile_pattern(config.answer_pattern)
    expected = [extract_answer(str(row["answer"]), pattern) for row in rows]
    if rows and all(answer is None for answer in expected):
        raise UserError(
            f"the pattern {config.answer_pattern!r} finds no answer in any of the {len(rows)} held-out references; "
            f"the first one is {str(rows[0]['answer'])[-80:]!r}",
            where="evaluation.exact_match.answer_pattern",
            fix="correct the pattern, or leave it out to compare whole answers",
        )
    outputs = greedy_answers(
        model,
        tokenizer,
        rows,
        max_new_tokens=config.max_new_tokens,
        batch_size=batch_size,
        source=source,
        autocast=autocast,
        progress=progress,
    )
    answers = [extract_answer(output.text, pattern) for output in outputs]
    return [
        RowMatch(
            correct=reference is not None and answer == reference,
            output=output.text,
            expected=str(row["answer"]).strip() if reference is None else reference,
            group=str(row.get("group") or ""),
            cut=output.cut,
            found=answer is not None,
        )
        for row, output, answer, reference in zip(rows, outputs, answers, expected, strict=True)
    ]


def extract_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a text, stripped: the pattern's last match, or all of the text if there is no pattern.

    The last match, because reasoning comes first and the answer at the end (``#### 72``). Of a match the first
    group is taken if the pattern has one, else the whole match. None if the pattern finds nothing: such an output
    is wrong, whatever the reference.
    """
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1].group(1 if pattern.groups else 0)
    return None if found is None else found.strip()


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The compiled answer pattern.

    Raises:
        UserError: it is no regular expression.
    """
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"not a regular expression: {error}",
            where="evaluation.exact_match.answer_pattern",
            fix=f"correct {pattern!r}, for instance '#### (.+)'",
        ) from None
