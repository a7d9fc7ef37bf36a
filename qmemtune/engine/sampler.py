"""The order of training rows where they are not grouped by length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

SPREAD = 1_000_003
"""Between the seeds of two orders: neighbouring seeds and epochs of runs must not share orders."""


class SeededRandomSampler(Sampler[int]):
    """A random order for each epoch that depends on the seed and the epoch only, not on the global random state.

    Args:
        length: number of rows.
        seed: the run's.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed * SPREAD + self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()
