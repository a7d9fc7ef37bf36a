"""How far routes tell groups of rows apart: mutual information, and nearness to the own group.

Tensor letters: L rows, N blocks, M atoms, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHUFFLES = 20
"""Random assignments of rows to groups by which chance is measured."""
MOST_INSTRUCTIONS = 500


@dataclass(frozen=True)
class Clustering:
    """How the rows' mean routes follow the groups."""

    mutual_information: float
    """I(group; atom) in nats, for an atom drawn from the route of a row's random token; mean over blocks."""
    chance: float
    """The same with groups shuffled over rows (mean of 20): what so few rows give by themselves."""
    mutual_information_by_block: list[float]
    nearest_group: float | None
    """Share of rows whose mean route is nearer to the mean of their own group (without themselves) than to any other
    group's; None if no group has two rows."""


def clustering(routes_LNM: Tensor, groups: Sequence[str]) -> Clustering:
    """How far rows' mean routes tell their groups apart.

    Args:
        routes_LNM: mean route of each row.
        groups: each row's group.
    """
    index = group_index(groups)
    by_block = mutual_information(routes_LNM, index)
    generator = torch.Generator().manual_seed(0)
    shuffled = [
        mutual_information(routes_LNM, index[torch.randperm(len(index), generator=generator)]).mean()
        for _ in range(SHUFFLES)
    ]
    distances = distances_to_groups(routes_LNM, index)
    counted = torch.bincount(index)[index] > 1
    nearest = (distances.argmin(dim=1) == index)[counted].double().mean().item() if bool(counted.any()) else None
    return Clustering(by_block.mean().item(), torch.stack(shuffled).mean().item(), by_block.tolist(), nearest)


def mutual_information(routes_LNM: Tensor, index_L: Tensor) -> Tensor:
    """I(group; atom) of each block in nats, (N,): entropy of the mean route minus the groups' mean entropy.

    It is zero where all groups use the atoms alike, and at most the smaller of log G and log M.
    """
    count = int(index_L.max()) + 1
    share = torch.bincount(index_L, minlength=count).double() / len(index_L)
    sums = torch.zeros(count, *routes_LNM.shape[1:], dtype=torch.float64).index_add_(0, index_L, routes_LNM.double())
    means = sums / (share * len(index_L)).clamp_min(1)[:, None, None]
    within = (share[:, None] * torch.special.entr(means).sum(dim=-1)).sum(dim=0)
    return (torch.special.entr(routes_LNM.double().mean(dim=0)).sum(dim=-1) - within).clamp_min(0)


def distances_to_groups(routes_LNM: Tensor, index_L: Tensor) -> Tensor:
    """Euclidean distance of each row's routes (all blocks) to each group's mean, (L, G).

    A row is left out of its own group's mean; a group of one row is infinitely far from it.
    """
    rows = routes_LNM.double().flatten(1)
    count = int(index_L.max()) + 1
    sizes = torch.bincount(index_L, minlength=count).double()
    sums = torch.zeros(count, rows.shape[1], dtype=torch.float64).index_add_(0, index_L, rows)
    distances = torch.cdist(rows, sums / sizes[:, None])
    own_size = sizes[index_L] - 1
    own = (rows - (sums[index_L] - rows) / own_size.clamp_min(1)[:, None]).norm(dim=1)
    distances[torch.arange(len(rows)), index_L] = own.masked_fill(own_size == 0, torch.inf)
    return distances


def by_instruction(routes_LNM: Tensor, groups: Sequence[str], instructions: Sequence[str]) -> dict[str, Any]:
    """Whether each wording of an instruction routes like the other wordings of its own group.

    Of each distinct instruction text the mean route of its rows is compared with the mean of each group, in which the
    text itself is left out. Groups with a single wording have nothing to compare with and are passed over.

    Returns:
        ``nearest_group`` (share of wordings nearest to their own group) and ``closer_group`` (share that is closer to
        the own group than to the others on average), both None if there are no wordings, and ``wordings``: a list of
        ``instruction``, ``group``, ``rows``, ``nearest``, ``distance`` (to the own group), ``next`` (to the nearest
        other group) and ``others`` (mean distance to the other groups).
    """
    wordings = sorted({(group, text) for group, text in zip(groups, instructions, strict=True) if text})
    names = sorted({group for group, _ in wordings})
    if len(wordings) > MOST_INSTRUCTIONS or len(names) < 2:
        return _of_wordings([])
    positions = {wording: i for i, wording in enumerate(wordings)}
    which = [positions.get((group, text), -1) for group, text in zip(groups, instructions, strict=True)]
    members = [[row for row, wording in enumerate(which) if wording == i] for i in range(len(wordings))]
    means = torch.stack([routes_LNM[rows].mean(dim=0) for rows in members])
    index = torch.tensor([names.index(group) for group, _ in wordings])
    distances = distances_to_groups(means, index)
    found = []
    for i, (group, text) in enumerate(wordings):
        own = distances[i, index[i]].item()
        if own == float("inf"):
            continue
        others = distances[i][torch.arange(len(names)) != index[i]]
        found.append(
            {
                "instruction": text,
                "group": group,
                "rows": len(members[i]),
                "nearest": names[int(distances[i].argmin())],
                "distance": own,
                "next": others.min().item(),
                "others": others.mean().item(),
            }
        )
    return _of_wordings(found)


def _of_wordings(found: list[dict[str, Any]]) -> dict[str, Any]:
    def share(hits: Iterable[bool]) -> float | None:
        return sum(hits) / len(found) if found else None

    return {
        "nearest_group": share(w["nearest"] == w["group"] for w in found),
        "closer_group": share(w["distance"] < w["others"] for w in found),
        "wordings": found,
    }


def group_index(groups: Sequence[str]) -> Tensor:
    """Each row's group as a number, (L,)."""
    names = sorted(set(groups))
    return torch.tensor([names.index(group) for group in groups])
