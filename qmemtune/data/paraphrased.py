"""Word-list tasks asked for in several wordings: does what is learned for some wordings hold for others?"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

Row = dict[str, str]

SEEN, UNSEEN = "seen", "unseen"

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reverse": (
        (
            "Reverse",
            "Turn the list around",
            "Write it backwards",
            "Last word first",
            "In opposite order",
            "Flip it",
        ),
        (
            "Read from the end to the start",
            "Invert the order",
            "Backwards, please",
        ),
    ),
    "sort": (
        (
            "Sort",
            "Put in alphabetical order",
            "Order from a to z",
            "Arrange by letter",
            "Alphabetize",
            "As in an index",
        ),
        (
            "List them alphabetically",
            "Sort by first letter",
            "From a to z, please",
        ),
    ),
    "rotate": (
        (
            "Rotate",
            "Move the first word to the end",
            "Shift left by one",
            "First goes last",
            "Cycle once",
            "Start later",
        ),
        (
            "Put the first word behind the others",
            "Rotate by one",
            "Shift the words to the left",
        ),
    ),
    "swap": (
        (
            "Swap ends",
            "Exchange first and last",
            "Trade the outer words",
            "Ends change places",
            "Swap outside",
            "Outer swap",
        ),
        (
            "Switch the first and the last word",
            "Let the ends trade places",
            "Exchange the outer words",
        ),
    ),
    "duplicate": (
        (
            "Double last",
            "Repeat the last word",
            "Say the final word twice",
            "Last word again",
            "Echo the end",
            "End twice",
        ),
        (
            "Write the last word two times",
            "Repeat the final word",
            "Twice the last",
        ),
    ),
    "spell": (
        (
            "Spell last",
            "Letters of the last word",
            "Spell out the final word",
            "Last word by letter",
            "Letter the end",
            "Spell end",
        ),
        (
            "Write the last word letter by letter",
            "Spell the final word",
            "Letters of the final word",
        ),
    ),
    "initials": (
        (
            "Initials",
            "First letters",
            "Only the first letter of each",
            "Give the initials",
            "Letters in front",
            "Abbreviate",
        ),
        (
            "The first letter of every word",
            "Write the initials",
            "Each word's first letter",
        ),
    ),
    "drop": (
        (
            "Drop second",
            "Leave out the second word",
            "Remove word two",
            "Without the second",
            "Skip number two",
            "Second one off",
        ),
        (
            "Omit the second word",
            "Delete word number two",
            "Drop the word in second place",
        ),
    ),
}
"""Family -> wordings of its instruction that occur in training, and some that do not."""

SEED = 20263
TRAIN_ROUNDS = 100
"""Each holds one row of every training wording; a prefix of the training rows is balanced."""
HELDOUT_ROWS_A_WORDING = 4


def paraphrased(
    functions: Mapping[str, Callable[[list[str]], list[str]]], words: Sequence[str], num_words: int
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of families in several wordings.

    No set of words of a held-out row occurs in training. Of the held-out wordings a third do not either.

    Args:
        functions: family -> what it does to the words.
        words: to draw from.
        num_words: of a row.

    Returns:
        rows with ``instruction``, ``prompt``, ``completion``, ``family`` and ``wording`` (seen or unseen).
    """
    rng = random.Random(SEED)
    heldout: list[Row] = []
    inputs: set[frozenset[str]] = set()
    for family, function in functions.items():
        for kind, texts in zip((SEEN, UNSEEN), WORDINGS[family], strict=True):
            for text in texts * HELDOUT_ROWS_A_WORDING:
                drawn = rng.sample(words, num_words)
                inputs.add(frozenset(drawn))
                heldout.append(_row(family, function, text, kind, drawn))
    train: list[Row] = []
    for _ in range(TRAIN_ROUNDS):
        asked = [(family, text) for family in functions for text in WORDINGS[family][0]]
        rng.shuffle(asked)
        for family, text in asked:
            drawn = rng.sample(words, num_words)
            while frozenset(drawn) in inputs:
                drawn = rng.sample(words, num_words)
            train.append(_row(family, functions[family], text, SEEN, drawn))
    rng.shuffle(heldout)
    return train, heldout


def _row(family: str, function: Callable[[list[str]], list[str]], text: str, kind: str, words: list[str]) -> Row:
    return {
        "instruction": text,
        "prompt": f"{text}: {' '.join(words)} ->",
        "completion": " " + " ".join(function(words)),
        "family": family,
        "wording": kind,
    }
