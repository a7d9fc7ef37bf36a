"""Paired intervals and summaries."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qmemtune.evaluation.exact_match import RowMatch
from qmemtune.evaluation.loss import RowLoss
from qmemtune.evaluation.paired import paired_difference
from qmemtune.evaluation.summary import differences, summarise


def test_intervals_cover_the_true_difference():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        tokens = generator.integers(3, 40, size=60)
        hard = generator.normal(2.0, 1.0, size=60)  # what makes a row hard for both models
        base = tokens * (hard + generator.normal(0, 0.3, 60))
        tuned = tokens * (hard - 0.4 + generator.normal(0, 0.3, 60))
        found = paired_difference(base, tuned, tokens)
        covered += found["low"] <= -0.4 <= found["high"]
        assert found["high"] - found["low"] < 0.5
    assert 86 <= covered <= 100


def test_the_difference_is_a_ratio_of_sums_and_repeatable():
    found = paired_difference([2.0, 30.0], [1.0, 20.0], [1, 10])
    assert found["difference"] == pytest.approx(-1.0)
    assert found == paired_difference([2.0, 30.0], [1.0, 20.0], [1, 10])
    assert paired_difference([0, 1, 0, 1], [1, 1, 0, 1])["difference"] == 0.25


def test_what_cannot_be_said_is_none():
    nothing = {"difference": None, "low": None, "high": None}
    assert paired_difference([], []) == nothing | {"n": 0}
    assert paired_difference([1.0, math.inf], [1.0, 2.0]) == nothing | {"n": 2}
    assert paired_difference([0.0], [0.0], [0]) == nothing | {"n": 1}
    assert paired_difference([3.0], [1.0]) == {"difference": -2.0, "low": None, "high": None, "n": 1}


def test_many_rows_take_little_memory():
    found = paired_difference(np.zeros(20_000), np.ones(20_000))
    assert (found["low"], found["high"], found["n"]) == (1.0, 1.0, 20_000)


LOSSES = [RowLoss(2.0, 4, "a"), RowLoss(6.0, 4, "b", mistaken=1), RowLoss(1.0, 2, "")]
MATCHES = [RowMatch(True, "x", "x", "a"), RowMatch(False, "y", "x", "b", cut=True, found=False)]


def test_loss_is_per_token_and_groups_are_apart():
    found = summarise(LOSSES, MATCHES)
    assert found["loss"] == pytest.approx(0.9)
    assert found["perplexity"] == pytest.approx(math.exp(0.9))
    assert (found["exact_match"], found["exact_match_rows"], found["rows"], found["tokens"]) == (0.5, 2, 3, 10)
    assert found["row_accuracy"] == pytest.approx(2 / 3)
    assert list(found["groups"]) == ["(no group)", "a", "b"]
    assert found["groups"]["b"] == {
        "loss": 1.5,
        "perplexity": math.exp(1.5),
        "row_accuracy": 0.0,
        "exact_match": 0.0,
        "exact_match_rows": 1,
        "exact_match_cut": 1,
        "exact_match_without_answer": 1,
        "rows": 1,
        "tokens": 4,
    }
    assert "exact_match" not in found["groups"]["(no group)"]


def test_without_groups_and_matches_neither_is_shown():
    assert set(summarise([RowLoss(1.0, 2)])) == {"loss", "perplexity", "row_accuracy", "rows", "tokens"}


@pytest.mark.parametrize("loss", [math.inf, math.nan, 1e6])
def test_what_is_not_finite_is_null_in_json(loss):
    found = summarise([RowLoss(loss, 1)])
    assert found["perplexity"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert summarise([])["loss"] is None


def test_differences_by_group():
    tuned = ([RowLoss(row.loss_sum / 2, row.tokens, row.group) for row in LOSSES], [*MATCHES[:1], MATCHES[0]])
    tuned[1][1] = RowMatch(True, "x", "x", "b")
    found = differences((LOSSES, MATCHES), tuned)
    assert found["loss"]["difference"] == pytest.approx(-0.45)
    assert found["exact_match"] == {"difference": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    assert found["groups"]["b"]["exact_match"]["difference"] == 1.0
    assert found["groups"]["a"]["loss"]["difference"] == pytest.approx(-0.25)
