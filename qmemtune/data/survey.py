"""What will be trained on, looked at before training: ``qmemtune data``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from qmemtune.config.data import DataConfig
from qmemtune.data.examples import Example
from qmemtune.data.prepare import Preparation, Progress, silent
from qmemtune.data.rows import IGNORED, TokenRows

BINS = 16
"""Bars of the histogram."""
QUANTILES = (0.05, 0.5, 0.95, 0.99)
WINDOW = 13
"""Words in a row that two texts share only if one is taken from the other (Brown et al. 2020, appendix C)."""
COMMON = 10
"""A run of words that so many training rows hold is wording they have in common, not a leak."""
SHOWN_LEAKS = 3
WORD = re.compile(r"\w+")
NEAR = 64
"""Rows after an index among which one of another file is looked for."""


def survey(config: DataConfig, tokenizer: Any, *, samples: int = 3, progress: Progress = silent) -> dict[str, Any]:
    """Prepare the rows and describe them.

    Args:
        config: the data options.
        tokenizer: the model's.
        samples: training rows to take apart.

    Returns:
        what :meth:`DataReport.as_dict` holds, and ``max_length``, ``loss_share``, ``lengths`` (histogram and
        quantiles, in tokens), ``duplicates``, ``leakage``, ``samples``.

    Raises:
        UserError: as :func:`qmemtune.data.prepare.prepare_data`.
    """
    preparation = Preparation(config, tokenizer, None, progress)
    data = preparation.run(with_train=True)
    report = data.report.as_dict()
    return {
        **report,
        "format": data.format,
        "max_length": config.max_length,
        "loss_share": report["train"]["loss_tokens"] / max(report["train"]["tokens"], 1),
        "lengths": length_histogram(data.train.lengths, data.heldout.lengths),
        "duplicates": duplicates(preparation.trained),
        "leakage": leakage(preparation.trained, preparation.held, data.report.removed_as_heldout),
        "samples": [taken_apart(data.train, i, tokenizer) for i in spread(data.train, samples)],
    }


def length_histogram(train: Sequence[int], heldout: Sequence[int]) -> dict[str, Any]:
    """Rows by length: ``edges`` of the bins, counts of both sides, and quantiles of the training rows."""
    longest = max([*train, *heldout], default=1)
    width = max(1, -(-longest // BINS))
    edges = np.arange(0, width * (-(-longest // width)) + 1, width)
    # Lengths are whole and at least 1: a bin holds what is above its lower edge, up to its upper one.
    counts = {
        name: np.histogram(np.asarray(lengths) - 0.5, edges)[0].tolist() if lengths else [0] * (len(edges) - 1)
        for name, lengths in (("train", list(train)), ("heldout", list(heldout)))
    }
    found = np.quantile(np.asarray(train), QUANTILES).round().astype(int).tolist() if train else [0] * len(QUANTILES)
    quantiles = {f"{quantile:.0%}": value for quantile, value in zip(QUANTILES, found, strict=True)}
    return {"edges": edges.tolist(), **counts, "quantiles": quantiles}


def duplicates(examples: Sequence[Example]) -> dict[str, int]:
    """Rows that say again what an earlier row said, and rows whose prompt has other answers elsewhere."""
    answers: dict[str, Counter[str]] = {}
    for example in examples:
        answers.setdefault(example.prompt_key(), Counter())[example.answer] += 1
    return {
        "same_row": sum(count - 1 for found in answers.values() for count in found.values()),
        "same_prompt_other_answer": sum(found.total() for found in answers.values() if len(found) > 1),
    }


def leakage(train: Sequence[Example], heldout: Sequence[Example], removed: int) -> dict[str, Any]:
    """Held-out rows that training rows give away.

    Returns:
        ``removed``: training rows left out for having a held-out row's prompt; ``same_words``: held-out rows whose
        question differs from a training row's in case, punctuation and spaces only; ``shared_passage``: held-out rows
        that share a run of :data:`WINDOW` words with a training row; ``examples`` of both.
    """
    questions = {words(example.user or example.answer): example for example in heldout}
    passages: dict[int, list[int]] = {}
    for i, example in enumerate(heldout):
        for passage in windows(text_of(example)):
            passages.setdefault(passage, []).append(i)
    same: set[str] = set()
    found: dict[int, list[Example]] = {}
    shown: list[dict[str, str]] = []
    for example in train:
        question = words(example.user or example.answer)
        if question and question in questions and question not in same:
            same.add(question)
            shown.append(pair("same words", questions[question], example))
        for passage in windows(text_of(example)) & passages.keys() if passages else ():
            holders = found.setdefault(passage, [])
            if len(holders) <= COMMON:
                holders.append(example)
    sharing = {i: holders[0] for passage, holders in found.items() if len(holders) <= COMMON for i in passages[passage]}
    shown += [pair("shared passage", heldout[i], holder) for i, holder in sharing.items()]
    return {
        "removed": removed,
        "same_words": len(same),
        "shared_passage": len(sharing),
        "examples": shown[:SHOWN_LEAKS],
    }


def words(text: str) -> str:
    return " ".join(WORD.findall(text.casefold()))


def windows(text: str) -> set[int]:
    """Hashes of every run of :data:`WINDOW` words."""
    found = WORD.findall(text.casefold())
    return {hash(tuple(found[i : i + WINDOW])) for i in range(len(found) - WINDOW + 1)}


def text_of(example: Example) -> str:
    turns = [message["content"] for message in example.messages if message["role"] != "system"]
    return "\n".join(turns) if turns else f"{example.user}\n{example.answer}"


def pair(kind: str, held: Example, trained: Example) -> dict[str, str]:
    return {"kind": kind, "heldout": held.raw.origin, "train": trained.raw.origin, "text": held.user[:80]}


def spread(rows: TokenRows, wanted: int) -> list[int]:
    """Indices spread evenly over the rows, and as far as that goes over their files: a mixture deals its sets out in a
    rhythm with which the distance of the indices may coincide."""
    count, shown = len(rows), Counter[str]()
    wanted = min(count, wanted)
    found = []
    for i in range(wanted):
        start, end = i * count // wanted, (i + 1) * count // wanted
        near = {index: rows[index]["origin"].rpartition(":")[0] for index in range(start, min(end, start + NEAR))}
        index = min(near, key=lambda index: (shown[near[index]], index))
        shown[near[index]] += 1
        found.append(index)
    return found


def taken_apart(rows: TokenRows, index: int, tokenizer: Any) -> dict[str, Any]:
    """A row as stretches of text, each in the loss or not, with special tokens written out."""
    row = rows[index]
    stretches: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        in_loss = label != IGNORED
        if not stretches or stretches[-1][0] != in_loss:
            stretches.append((in_loss, []))
        stretches[-1][1].append(token)
    parts = [{"text": tokenizer.decode(ids), "tokens": len(ids), "loss": in_loss} for in_loss, ids in stretches]
    return {"origin": row["origin"], "tokens": len(row["input_ids"]), "parts": parts}
