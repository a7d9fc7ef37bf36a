"""Data sets the project makes itself, from a fixed seed: ``data.path=generated:NAME``.

``word_lists`` mixes instruction families that want different things of the same kind of input. The words are single
tokens in most byte-level vocabularies, so rows are short; the answers are exact. A change to the rows it makes is a new
name: results stay comparable.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Row = dict[str, str]

WORDS = (
    "cat dog sun tree book fish bird car house milk bread stone river cloud apple chair table door lamp ring king "
    "queen horse sheep goat wolf bear lion tiger mouse snake frog duck hen egg leaf root seed flower grass hill lake "
    "sea wave sand rock gold iron wood glass paper pen ink map boat ship train bus bike road bridge tower wall roof "
    "floor bed cup plate fork knife spoon pot pan salt sugar rice corn bean nut plum pear peach lemon grape berry "
    "honey butter cheese meat soup cake pie tea coffee water juice fire smoke ice snow rain wind storm star moon sky "
    "day night week month year hand foot head eye ear nose mouth arm leg knee back heart blood bone skin hair coat "
    "hat shoe sock shirt belt bag box key lock bell drum horn song dance game ball rope net wheel nail hammer"
).split()

FAMILIES: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "reverse": ("Reverse the words", lambda w: w[::-1]),
    "sort": ("Sort the words", lambda w: sorted(w)),
    "rotate": ("Move the first word to the end", lambda w: w[1:] + w[:1]),
    "swap": ("Swap the first and last word", lambda w: [w[-1], *w[1:-1], w[0]]),
    "duplicate": ("Write each word twice", lambda w: [x for x in w for _ in range(2)]),
    "spell": ("Spell the last word", lambda w: list(w[-1])),
    "initials": ("Write the first letters", lambda w: [x[0] for x in w]),
    "drop": ("Drop the second word", lambda w: [w[0], *w[2:]]),
}
"""Family -> its instruction, and what it does to the words."""

NUM_WORDS = 4
TRAIN_ROWS = 8_000
HELDOUT_ROWS_A_FAMILY = 24


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


GENERATED: dict[str, Callable[[], tuple[list[Row], list[Row]]]] = {"word_lists": word_lists}
"""Name -> function that makes the training and the held-out rows."""
