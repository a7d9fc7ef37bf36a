"""Data sets the project makes itself, from a fixed seed: ``data.path=generated:NAME``.

``word_lists`` mixes instruction families that want different things of the same kind of input. The words are single
tokens in most byte-level vocabularies, so rows are short; the answers are exact. ``word_lists_hard`` asks for twelve
things by made-up words, ``word_lists_many`` for 24; in ``word_codes`` each of four made-up words is a code that stands
for another word in place of every word. A change to the rows a name makes is a new name: results stay comparable.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from qmemtune.data.paraphrased import paraphrased

Row = dict[str, str]
Families = Mapping[str, tuple[str, Callable[[list[str]], list[str]]]]
"""Family -> its instruction, and what it does to the words."""

WORDS = ("ant bag bed cat cup dog ear egg fox hat ice jam key leg log map net oak pig rat sea sun tea van").split()

FAMILIES: Families = {
    "reverse": ("Reverse", lambda w: w[::-1]),
    "sort": ("Sort", lambda w: sorted(w)),
    "rotate": ("Rotate", lambda w: w[1:] + w[:1]),
    "swap": ("Swap ends", lambda w: [w[-1], *w[1:-1], w[0]]),
    "duplicate": ("Double last", lambda w: [*w, w[-1]]),
    "spell": ("Spell last", lambda w: list(w[-1])),
    "initials": ("Initials", lambda w: [x[0] for x in w]),
    "drop": ("Drop second", lambda w: [w[0], *w[2:]]),
}

# Words that mean nothing: what they ask for can only be learned from the rows, so that twelve families compete for
# few directions and LoRA of a low rank does not learn all of them.
HARD_FAMILIES: Families = {
    "reverse": ("Zorp", lambda w: w[::-1]),
    "sort": ("Blick", lambda w: sorted(w)),
    "sort_down": ("Trund", lambda w: sorted(w, reverse=True)),
    "rotate": ("Vemp", lambda w: w[1:] + w[:1]),
    "rotate_back": ("Quash", lambda w: w[-1:] + w[:-1]),
    "swap_ends": ("Frob", lambda w: [w[-1], *w[1:-1], w[0]]),
    "swap_pairs": ("Glim", lambda w: [w[1], w[0], w[3], w[2]]),
    "swap_halves": ("Dwell", lambda w: w[2:] + w[:2]),
    "double_last": ("Yark", lambda w: [*w, w[-1]]),
    "drop_second": ("Plim", lambda w: [w[0], *w[2:]]),
    "initials": ("Snar", lambda w: [x[0] for x in w]),
    "spell_last": ("Krill", lambda w: list(w[-1])),
}

NUM_WORDS = 4


def picked(order: str) -> Callable[[list[str]], list[str]]:
    """The words at these places, counted from 1: ``4321`` is the list backwards."""
    return lambda words: [words[int(place) - 1] for place in order]


# Nothing here is hard in itself, and there are many of them: what a command stands for must be remembered, and the
# words moved by it. So it is the number of directions that is short, not the steps to learn one thing, as in sorting.
MANY_COMMANDS = (
    "Zorp 4321, Blick 2341, Trund 4123, Vemp 4231, Quash 2143, Frob 3412, Glim 1324, Dwell 3214, Yark 1432, Plim 2134, "
    "Snar 1243, Krill 3142, Mosk 2413, Tolv 4312, Brane 3421, Huld 1342, Orv 1423, Pesk 124, Wuld 134, Stig 234, "
    "Crem 12344, Nalv 11234, Flen 1144, Jurb 1122"
)
MANY_FAMILIES: Families = {
    order: (command, picked(order)) for command, order in (pair.split() for pair in MANY_COMMANDS.split(", "))
}


def code(seed: int) -> Callable[[list[str]], list[str]]:
    """A code: each word is replaced by another one, always the same."""
    book = dict(zip(WORDS, random.Random(seed).sample(WORDS, len(WORDS)), strict=True))
    return lambda words: [book[word] for word in words]


# What a word becomes depends on the word and on the command at once: neither alone says anything about the answer.
CODE_FAMILIES: Families = {
    command.lower(): (command, code(number)) for number, command in enumerate(("Zorp", "Blick", "Trund", "Vemp"))
}
TRAIN_ROWS = 4_000
HARD_TRAIN_ROWS = 8_000
HELDOUT_ROWS_A_FAMILY = 20
CODE_HELDOUT_ROWS_A_FAMILY = 80
HARD_HELDOUT_ROWS_A_FAMILY = 40
MANY_HELDOUT_ROWS_A_FAMILY = 20


def word_lists() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of eight families with plain instructions."""
    return mixed(FAMILIES, seed=20261, train_rows=TRAIN_ROWS, heldout_rows=HELDOUT_ROWS_A_FAMILY)


def word_lists_hard() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of twelve families whose instructions are made-up words."""
    return mixed(HARD_FAMILIES, seed=20262, train_rows=HARD_TRAIN_ROWS, heldout_rows=HARD_HELDOUT_ROWS_A_FAMILY)


def word_lists_many() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of 24 families, each an order of the words under a made-up word."""
    return mixed(MANY_FAMILIES, seed=20263, train_rows=HARD_TRAIN_ROWS, heldout_rows=MANY_HELDOUT_ROWS_A_FAMILY)


def word_codes() -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of four codes."""
    return mixed(CODE_FAMILIES, seed=20264, train_rows=HARD_TRAIN_ROWS, heldout_rows=CODE_HELDOUT_ROWS_A_FAMILY)


def mixed(kinds: Families, *, seed: int, train_rows: int, heldout_rows: int) -> tuple[list[Row], list[Row]]:
    """Rows of several families, mixed evenly.

    No set of words of a held-out row occurs in training, in whatever order and with whatever instruction.

    Args:
        kinds: the families.
        seed: of words and order.
        train_rows: in all.
        heldout_rows: of each family.

    Returns:
        rows with ``instruction``, ``prompt``, ``completion`` and ``family``.
    """
    rng = random.Random(seed)
    heldout_inputs: set[frozenset[str]] = set()
    heldout: list[Row] = []
    for family in kinds:
        for _ in range(heldout_rows):
            words = rng.sample(WORDS, NUM_WORDS)
            heldout_inputs.add(frozenset(words))
            heldout.append(_row(kinds, family, words))
    train: list[Row] = []
    families = list(kinds)
    while len(train) < train_rows:
        words = rng.sample(WORDS, NUM_WORDS)
        if frozenset(words) not in heldout_inputs:
            train.append(_row(kinds, families[len(train) % len(families)], words))
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def _row(kinds: Families, family: str, words: list[str]) -> Row:
    instruction, function = kinds[family]
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
    "word_lists_hard": word_lists_hard,
    "word_lists_many": word_lists_many,
    "word_lists_paraphrased": word_lists_paraphrased,
    "word_codes": word_codes,
}
"""Name -> function that makes the training and the held-out rows."""
