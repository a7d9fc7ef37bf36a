"""What queries may read in place of the low-rank state: a fixed sketch of the block's input, centred and scaled.

The low-rank state points much the same way for all tokens of a block, and so do queries formed from it: routers then
settle on one or two atoms. Centred, inputs differ from token to token from the first step on.

Tensor letters: D input width, S sketch width, N blocks; ``...`` are the leading dimensions of a layer's input.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOOR = 0.01
"""Added to each variance, as a share of their mean, so that what hardly varied at first is not blown up later."""

MASK = (1 << 64) - 1


def _mixed(value: int) -> int:
    """A 64-bit integer's bits mixed (the finaliser of SplitMix64, Steele et al. 2014): alike on every machine."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=32)
def sketch_matrix(width: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A count sketch (Charikar et al. 2002): each of ``width`` inputs with a fixed sign in one of ``size`` sums.

    Returns:
        (size, width), one entry of 1 or -1 a column.
    """
    matrix = torch.zeros(size, width)
    for column in range(width):
        mixed = _mixed(column)
        matrix[(mixed >> 1) % size, column] = 1.0 if mixed & 1 else -1.0
    return matrix.to(device, dtype)


class InputSketch(nn.Module):
    """The sketch of each block's input less its mean, over its standard deviation, both of one forward pass.

    The pass is the first in training, over its real tokens. Before it all sketches are zero: nothing but the block's
    offset and the earlier blocks decides the route.

    Shapes: mean and inverse_std (N, S).
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0, size))
        self.register_buffer("inverse_std", torch.zeros(0, size))

    def add_block(self) -> None:
        """Add one block, not measured yet."""
        for name in ("mean", "inverse_std"):
            value = getattr(self, name)
            setattr(self, name, torch.cat([value, value.new_zeros(1, value.shape[1])]))

    @torch.no_grad()
    def forward(self, block: int, x: Tensor, mask: Tensor | None, measure: bool) -> Tensor:
        """The features of a block's tokens, (..., S), float32, without gradient.

        Args:
            block: index of the block.
            x: input of its first layer, (..., D).
            mask: real tokens, of as many entries as ``x`` has tokens; all if None.
            measure: take mean and deviation from this pass if they are not known yet.
        """
        sums = F.linear(x, sketch_matrix(x.shape[-1], self.mean.shape[1], x.dtype, x.device)).float()
        if measure:
            self._measure(block, sums.flatten(0, -2), mask)
        mean, inverse_std = self.mean[block].to(sums), self.inverse_std[block].to(sums)
        return (sums - mean).mul_(inverse_std)

    def _measure(self, block: int, sums: Tensor, mask: Tensor | None) -> None:
        """Without a branch on what a tensor holds: that would stop a GPU in every step, and tracing altogether."""
        weights = sums.new_ones(len(sums), 1)
        if mask is not None and mask.numel() == len(sums):
            weights = mask.to(sums).reshape(-1, 1)
        count = weights.sum()
        mean = (weights * sums).sum(0) / count
        variance = (weights * (sums - mean).square()).sum(0) / count
        inverse_std = (variance + FLOOR * variance.mean()).rsqrt()
        # A pass with overflow, or of one token, measures nothing: the next one will.
        take = (mean.isfinite() & inverse_std.isfinite()).all() & ~self.inverse_std[block].any()
        self.mean[block] = torch.where(take, mean.to(self.mean), self.mean[block])
        self.inverse_std[block] = torch.where(take, inverse_std.to(self.inverse_std), self.inverse_std[block])
