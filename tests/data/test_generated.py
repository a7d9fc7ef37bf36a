"""Data sets the project makes itself."""

from __future__ import annotations

from collections import Counter

import pytest

from qmemtune.data.generated import GENERATED, HARD_FAMILIES, WORDS


@pytest.mark.parametrize("name", GENERATED)
def test_rows_are_the_same_each_time_and_held_out_inputs_are_new(name):
    train, heldout = GENERATED[name]()
    assert (train, heldout) == GENERATED[name]()
    inputs = [{frozenset(row["prompt"].split()) & set(WORDS) for row in rows} for rows in (train, heldout)]
    assert not inputs[0] & inputs[1]


def test_hard_commands_mean_nothing_and_ask_for_different_things():
    train, heldout = GENERATED["word_lists_hard"]()
    words = ["fox", "ant", "tea", "cat"]
    answers = {tuple(function(words)) for _, function in HARD_FAMILIES.values()}
    assert len(answers) == len(HARD_FAMILIES) == 12
    counts = Counter(row["family"] for row in train).values()
    assert max(counts) - min(counts) <= 1
    assert set(Counter(row["family"] for row in heldout).values()) == {40}
