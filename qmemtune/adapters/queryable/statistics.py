"""How a router uses its atoms: sums over tokens, and what they say about its health.

Tensor letters: B batch, T tokens, M atoms, N blocks, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qmemtune.adapters.queryable.memory import QueryableMemory

DEAD_SHARE = 0.1
"""An atom is dead if no block gives it this part of an even share, ``1 / M``."""
FEW_ATOMS = 0.1
"""A block has collapsed if its effective number of atoms is at most this part of the way from 1 to M."""

NO_ENTROPY = 0.02
"""A block's routes have hardened if their mean entropy is below this part of log M: no gradient moves them any more."""


@dataclass(frozen=True)
class RouteUse:
    """The use of the atoms by the tokens that were seen."""

    use: list[list[float]]
    """Block -> mean weight of each atom, N lists of M numbers; each list sums to one, or is all zeros where no token
    passed through the block."""
    entropy: list[float]
    """Block -> mean entropy of a token's route as a share of log M: 0 is one atom a token, 1 is all alike."""
    tokens: int

    @property
    def seen(self) -> list[int]:
        """Blocks that tokens passed through: text passes through no block of a tower of images or sounds."""
        return [b for b, weights in enumerate(self.use) if any(weights)]

    @property
    def effective_atoms(self) -> list[float]:
        """Block -> exponential of the entropy of its mean use: how many evenly used atoms would be as varied; zero for
        a block that was not seen."""
        return [math.exp(-sum(w * math.log(w) for w in block if w > 0)) if any(block) else 0.0 for block in self.use]

    @property
    def dead_atoms(self) -> list[int]:
        """Atoms that get less than a tenth of an even share in every block."""
        limit = DEAD_SHARE / len(self.use[0])
        return [m for m in range(len(self.use[0])) if all(block[m] < limit for block in self.use)]

    @property
    def collapsed_blocks(self) -> list[int]:
        """Blocks in which a few atoms take nearly all the weight, the same ones for every token."""
        limit = 1 + FEW_ATOMS * (len(self.use[0]) - 1)
        effective = self.effective_atoms
        return [b for b in self.seen if len(self.use[0]) > 1 and effective[b] <= limit]

    def collapse(self, top_k: int | None = None) -> str | None:
        """What is wrong with the router, one line; None for a healthy one.

        It has collapsed when in at least half of the blocks a few atoms take nearly all the weight, or the entropy is
        near zero (which is as it should be with ``top_k`` 1), or when more than half of the atoms are dead.
        """
        blocks, atoms = len(self.seen), len(self.use[0])
        few, dead = self.collapsed_blocks, self.dead_atoms
        hard = [] if atoms == 1 or top_k == 1 else [b for b in self.seen if self.entropy[b] < NO_ENTROPY]
        if not blocks or (max(2 * len(few), 2 * len(hard)) < blocks and 2 * len(dead) <= atoms):
            return None
        parts = []
        if few:
            top = sum(max(self.use[b]) for b in few) / len(few)
            parts.append(f"in {len(few)} of {blocks} blocks one atom takes {top:.0%} of the weight")
        if hard:
            parts.append(f"in {len(hard)} of {blocks} blocks each token takes one atom (entropy near zero)")
        if dead:
            parts.append(f"{len(dead)} of {atoms} atoms are dead (less than a tenth of an even share in every block)")
        return "the router has collapsed: " + "; ".join(parts)


class RouteStatistics:
    """A route observer that sums up one adapter's routes; set it as ``memory.observer`` for some forward passes.

    Costs a few elementwise passes over the routes (B, T, M) of each block, and no synchronisation with a GPU before
    :meth:`use` is asked.

    Args:
        adapter: whose routes.
        dtype: of the sums.
    """

    def __init__(self, adapter: str, dtype: torch.dtype = torch.float32) -> None:
        self.adapter, self.dtype = adapter, dtype
        self._sums: dict[int, Tensor] = {}

    def __call__(self, name: str, block: int, weights: Tensor, mask: Tensor | None) -> None:
        """Add a route (..., M); padding, where ``mask`` (B, T) fits, does not count."""
        if name != self.adapter:
            return
        flat = weights.detach().flatten(0, -2).to(self.dtype)
        entropy = torch.special.entr(flat).sum(dim=-1)
        if mask is not None and mask.shape == weights.shape[:-1]:
            # No matrix product: autocast would round the sums.
            real = mask.flatten().to(flat)
            sums = torch.cat([(flat * real[:, None]).sum(dim=0), (entropy * real).sum()[None], real.sum()[None]])
        else:
            sums = torch.cat([flat.sum(dim=0), entropy.sum()[None], flat.new_tensor([flat.shape[0]])])
        self._sums[block] = self._sums[block] + sums if block in self._sums else sums

    @property
    def observed(self) -> bool:
        """Whether any route was."""
        return bool(self._sums)

    def table(self, device: torch.device) -> Tensor:
        """The sums, (N, M + 2): weights, entropies in nats, tokens. Several processes' tables may be added.

        Row i is block i, N one more than the last block seen; a block before it that was not seen has zeros.

        Raises:
            ValueError: no route was formed.
        """
        if not self.observed:
            raise ValueError("no route was formed while the statistics were observing")
        nothing = torch.zeros_like(next(iter(self._sums.values())))
        return torch.stack([self._sums.get(block, nothing).to(device) for block in range(max(self._sums) + 1)])

    @staticmethod
    def use(table: Tensor) -> RouteUse:
        """What a table says."""
        table = table.double().cpu()
        atoms, tokens = table.shape[1] - 2, table[:, -1:].clamp_min(1.0)
        scale = math.log(atoms) if atoms > 1 else 1.0
        return RouteUse(
            use=(table[:, :-2] / tokens).tolist(),
            entropy=(table[:, -2] / tokens[:, 0] / scale).tolist(),
            tokens=int(table[:, -1].max().item()),
        )


@dataclass(frozen=True)
class AtomFacts:
    """The atoms themselves."""

    core_norm: list[float]
    """Frobenius norm of each core; the identity that it is added to has norm sqrt(R)."""
    key_norm: list[float]
    core_similarity: list[list[float]]
    """Cosine between cores taken as vectors, M x M."""
    key_similarity: list[list[float]]
    """Cosine between keys, M x M."""


def active_adapter(memory: QueryableMemory) -> str:
    """The name of the adapter that is switched on (the first, should there be several)."""
    return str(memory.active_adapters[0])


def atom_facts(memory: QueryableMemory, adapter: str) -> AtomFacts:
    """Norms and similarities of an adapter's atoms."""
    core = memory.cores(adapter, memory.queryable_core[adapter]).detach().double().flatten(1).cpu()
    key = memory.queryable_key[adapter].detach().double().cpu()
    similarity = []
    for vectors in (core, key):
        unit = F.normalize(vectors, dim=-1)
        similarity.append((unit @ unit.T).tolist())
    return AtomFacts(core.norm(dim=-1).tolist(), key.norm(dim=-1).tolist(), similarity[0], similarity[1])
