"""How far routes tell groups apart, on routes made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from qmemtune.evaluation.association import by_instruction, clustering, group_index, mutual_information

APART = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
GROUPS = ["a", "a", "b", "b"]


def test_routes_that_decide_the_group_carry_all_its_information():
    found = clustering(APART, GROUPS)
    assert found.mutual_information == pytest.approx(math.log(2))
    assert found.nearest_group == 1.0
    assert found.chance < found.mutual_information


def test_routes_alike_carry_none():
    assert mutual_information(torch.full((4, 3, 5), 0.2), group_index(GROUPS)).tolist() == pytest.approx([0.0] * 3)


def test_a_group_of_one_row_has_no_own_mean():
    found = clustering(APART[:3], ["a", "a", "b"])
    assert found.nearest_group == 1.0
    assert clustering(APART[1:3], ["a", "b"]).nearest_group is None


def test_wordings_are_compared_with_the_other_wordings_of_their_group():
    routes = torch.cat([APART, torch.tensor([[[0.9, 0.1]]])])
    found = by_instruction(routes, [*GROUPS, "b"], ["A1", "A2", "B1", "B2", "B3"])
    nearest = {wording["instruction"]: wording["nearest"] for wording in found["wordings"]}
    assert nearest == {"A1": "a", "A2": "a", "B1": "b", "B2": "b", "B3": "a"}
    assert found["nearest_group"] == 0.8
    # One wording a group: nothing to compare with.
    assert by_instruction(APART, GROUPS, GROUPS) == {"nearest_group": None, "closer_group": None, "wordings": []}


def test_a_wording_may_be_closer_to_its_own_group_than_to_the_others_and_not_nearest():
    routes = torch.tensor([[[1.0, 0.0, 0.0]], [[0.6, 0.4, 0.0]], [[0.4, 0.6, 0.0]], [[0.0, 0.0, 1.0]]])
    found = by_instruction(routes, ["a", "a", "b", "c"], ["A1", "A2", "B", "C"])
    nearest = {wording["instruction"]: wording["nearest"] for wording in found["wordings"]}
    assert nearest == {"A1": "a", "A2": "b"}
    assert (found["nearest_group"], found["closer_group"]) == (0.5, 1.0)
    own, others = [[w[kind] for w in found["wordings"]] for kind in ("distance", "others")]
    assert own == pytest.approx([0.32**0.5, 0.32**0.5])
    assert others == pytest.approx([((0.72**0.5) + 2**0.5) / 2, ((0.08**0.5) + 1.52**0.5) / 2])
