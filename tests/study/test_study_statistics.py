"""Paired statistics against known values."""

from __future__ import annotations

import math
import random

import pytest

from qmemtune.study.statistics import interquartile_range, mean_interval, paired_difference, paired_ratio, t_quantile
from qmemtune.study.tables import plain_interval


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (9, 2.262157), (30, 2.042272)]
)
def test_quantiles_of_t_are_those_of_tables(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-6)


def test_a_ratio_is_the_geometric_mean_with_an_interval_around_it():
    found = paired_ratio([1.0, 2.0, 4.0], [0.5, 1.0, 4.0])
    assert found["value"] == pytest.approx(0.25 ** (1 / 3))
    assert found["low"] < found["value"] < found["high"]
    assert (found["n"], found["wins"], found["losses"]) == (3, 2, 0)


def test_ratios_turn_around_with_their_sides():
    base, other = [0.3, 0.5, 0.2, 0.4], [0.25, 0.45, 0.22, 0.3]
    there, back = paired_ratio(base, other), paired_ratio(other, base)
    assert there["low"] == pytest.approx(1 / back["high"])
    assert (there["wins"], there["losses"]) == (back["losses"], back["wins"])


def test_of_shares_higher_is_better():
    found = paired_difference([0.5, 0.6], [0.7, 0.6])
    assert found["value"] == pytest.approx(0.1)
    assert (found["wins"], found["losses"]) == (1, 0)


def test_a_single_pair_has_no_interval():
    assert paired_ratio([2.0], [1.0]) == {"value": 0.5, "low": None, "high": None, "n": 1, "wins": 1, "losses": 0}
    assert mean_interval([]) == {"value": None, "low": None, "high": None}


def test_a_ratio_needs_losses_above_zero():
    with pytest.raises(ValueError, match="above zero"):
        paired_ratio([0.0], [1.0])


def test_the_interval_covers_as_often_as_it_says():
    drawn = random.Random(0)
    covered = 0
    for _ in range(2000):
        found = mean_interval([drawn.gauss(1.0, 2.0) for _ in range(5)])
        covered += found["low"] <= 1.0 <= found["high"]
    assert abs(covered / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_interquartile_range_of_evenly_spaced_values():
    assert interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.0)


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    assert plain_interval({"value": -1e-17, "low": -0.124, "high": 0.124}) == "+0.000 [-0.124, +0.124]"
