"""The word lists in several wordings: balanced, held out by words and by wording."""

from __future__ import annotations

from collections import Counter

from qmemtune.data.generated import FAMILIES, word_lists_paraphrased
from qmemtune.data.paraphrased import WORDINGS


def words_of(row):
    return frozenset(row["prompt"].partition(": ")[2].removesuffix(" ->").split())


def test_held_out_words_and_unseen_wordings_do_not_occur_in_training():
    train, heldout = word_lists_paraphrased()
    assert not {words_of(row) for row in train} & {words_of(row) for row in heldout}
    taught = {row["instruction"] for row in train}
    for row in heldout:
        assert (row["instruction"] in taught) == (row["wording"] == "seen")
    assert Counter(row["wording"] for row in heldout) == {"seen": 8 * 6 * 4, "unseen": 8 * 3 * 4}


def test_any_whole_number_of_rounds_is_balanced():
    train, heldout = word_lists_paraphrased()
    for rows, each in ((train[:48], 1), (train[:96], 2)):
        assert set(Counter(row["instruction"] for row in rows).values()) == {each}
    assert set(Counter(row["family"] for row in heldout).values()) == {36}


def test_a_wording_means_one_family():
    texts = [text for wordings in WORDINGS.values() for part in wordings for text in part]
    assert len(texts) == len(set(texts)) == 8 * 9
    assert set(WORDINGS) == set(FAMILIES)


def test_rows_are_answered_by_their_family():
    for row in word_lists_paraphrased()[1]:
        words = row["prompt"].rpartition(": ")[2].removesuffix(" ->").split()
        assert row["completion"].split() == FAMILIES[row["family"]][1](words)
