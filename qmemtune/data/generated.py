"""Data sets the project makes itself, from a fixed seed: ``data.path=generated:NAME``.

``word_lists`` mixes instruction families that want different things of the same kind of input. The words are single
tokens in most byte-level vocabularies, so rows are short; the answers are exact. A change to the rows it makes is a new
name: results stay comparable.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from qmemtune.data.paraphrased import paraphrased

Row = dict[str, str]

WORDS = ("ant bag bed cat cup dog ear egg fox hat ice jam key leg log map net oak pig rat sea sun tea van").split()

FAMILIES: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "reverse": ("Reverse", lambda w: w[::-1]),
    "sort": ("Sort", lambda w: sorted(w)),
    "rotate": ("Rotate", lambda w: w[1:] + w[:1]),
    "swap": ("Swap ends", lambda w: [w[-1], *w[1:-1], w[0]]),
    "duplicate": ("Double last", lambda w: [*w, w[-1]]),
    "spell": ("Spell last", lambda w: list(w[-1])),
    "initials": ("Initials", lambda w: [x[0] for x in w]),
    "drop": ("Drop second", lambda w: [w[0], *w[2:]]),
}
"""Family -> its instruction, and what it does to the words."""

NUM_WORDS = 4
TRAIN_ROWS = 4_000
HELDOUT_ROWS_A_FAMILY = 20


def word_lists() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of the eight families, mixed evenly.

    No set of words of a held-out row occurs in training, in whatever order and with whatever instruction.

    Returns:
        rows with ``instruction``, ``prompt``, ``completion`` and ``family``.
    """
    rng = random.Random(20261)
    heldout_inputs: set[frozenset[str]] = set()
    heldout: list[Row] = []
    for family in FAMILIES:
        for _ in range(HELDOUT_ROWS_A_FAMILY):
            words = rng.sample(WORDS, NUM_WORDS)
            heldout_inputs.add(frozenset(words))
            heldout.append(_row(family, words))
    train: list[Row] = []
    families = list(FAMILIES)
    while len(train) < TRAIN_ROWS:
        words = rng.sample(WORDS, NUM_WORDS)
        if frozenset(words) not in heldout_inputs:
            train.append(_row(families[len(train) % len(families)], words))
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def _row(family: str, words: list[str]) -> Row:
    instruction, function = FAMILIES[family]
    return {
        "instruction": instruction,
        "prompt": f"{instruction}: {' '.join(words)} ->",
        "completion": " " + " ".join(function(words)),
        "family": family,
    }


def word_lists_paraphrased() -> tuple[list[Row], list[Row]]:
    """The eight families, each asked for in six wordings, and on held-out rows in three more."""
    return paraphrased({name: function for name, (_, function) in FAMILIES.items()}, WORDS, NUM_WORDS)


GENERATED: dict[str, Callable[[], tuple[list[Row], list[Row]]]] = {
    "word_lists": word_lists,
    "word_lists_paraphrased": word_lists_paraphrased,
}
"""Name -> function that makes the training and the held-out rows."""
