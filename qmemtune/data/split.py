"""Held-out rows: split off by a hash of the prompt, so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from qmemtune.data.examples import Example


def split_rows(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example], str | None]:
    """Split examples into training and held-out ones.

    Rows with the same prompt stay together. The choice depends on the seed and the prompts only: neither the order of
    the rows nor how many of them are used later changes it, and both sides keep their order.

    Returns:
        training rows, held-out rows, and a warning where the split could not be made as asked.
    """
    if fraction <= 0 or not examples:
        return list(examples), [], None
    if len(examples) == 1:
        return list(examples), [], "there is only one row: none is held out"
    wanted = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[example.prompt_key()].append(i)
    chosen: set[int] = set()
    for key in sorted(groups, key=lambda key: hashed(key, seed)):
        # A prompt with too many rows is passed over; the next ones fill up.
        if len(chosen) + len(groups[key]) <= wanted:
            chosen.update(groups[key])
        if len(chosen) == wanted:
            break
    warning = None
    if not chosen:
        order = sorted(range(len(examples)), key=lambda i: hashed(f"{i}\0{examples[i].answer}", seed))
        chosen = set(order[:wanted])
        warning = "prompts repeat so often that held-out rows share prompts with training rows"
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)], warning


def hashed(text: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()


def without_heldout(train: Sequence[Example], heldout: Sequence[Example]) -> tuple[list[Example], int]:
    """Training rows whose prompt is no held-out row's, and how many were removed."""
    keys = {example.prompt_key() for example in heldout}
    kept = [example for example in train if example.prompt_key() not in keys]
    return kept, len(train) - len(kept)
