"""A few generated answers to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from qmemtune.config.evaluation import SamplesConfig
from qmemtune.data.encode import decoded
from qmemtune.evaluation.decode import greedy_answers
from qmemtune.evaluation.forward import Autocast, Instructions

Row = TypeVar("Row")


@dataclass(frozen=True)
class Sample:
    """One prompt, what the model answered, and the reference."""

    prompt: str
    output: str
    expected: str

    def as_dict(self) -> dict[str, str]:
        """The three fields, for JSON."""
        return asdict(self)


def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: SamplesConfig,
    *,
    batch_size: int,
    source: Instructions | None = None,
    autocast: Autocast = nullcontext,
) -> list[Sample]:
    """Greedy answers to ``config.count`` rows, evenly spaced over ``rows``: the same rows every time.

    Args:
        rows: dicts with ``prompt_ids``, ``answer`` and optionally ``instruction``.
    """
    chosen = evenly_spaced(rows, config.count)
    outputs = greedy_answers(
        model,
        tokenizer,
        chosen,
        max_new_tokens=config.max_new_tokens,
        batch_size=batch_size,
        source=source,
        autocast=autocast,
    )
    return [
        Sample(decoded(tokenizer, row["prompt_ids"]), output.text, str(row["answer"]))
        for row, output in zip(chosen, outputs, strict=True)
    ]


def evenly_spaced(rows: Sequence[Row], count: int | None) -> list[Row]:
    """``count`` rows spread over all (rows are often sorted by kind), in their order; all if None or too few."""
    if count is None or count >= len(rows):
        return [rows[i] for i in range(len(rows))]
    return [rows[i * len(rows) // count] for i in range(count)]
