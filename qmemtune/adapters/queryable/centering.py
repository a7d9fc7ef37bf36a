"""The mean input of each block's first layer, which queries do without.

Inputs of a language model's layers have much in common, and so have their low-rank states: queries formed from them
hardly differ from token to token, and a router settles on one or two atoms within some twenty steps. Less the state of
the mean input, states differ from the first step on. The mean stays as it was first met, so that routes change with the
factors only.

Tensor letters: D input width, R rank; ``...`` are the leading dimensions of a layer's input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

ROUNDING = 1e-4
"""Added to a centred state's mean square, as a share of the whole state's: what rounding leaves of a state that equals
the mean one (some 1e-6 in bfloat16) has no direction to be blown up."""
EPS = 1e-6


class InputMeans(nn.Module):
    """Mean inputs, ``mean_0`` and so on, (D,): that of the first training pass over its real tokens; zero before."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def add_block(self, block: int, width: int) -> None:
        """Add a block, or change the ``width`` of its inputs; its mean is to be measured."""
        known = getattr(self, f"mean_{block}", None)
        self.register_buffer(f"mean_{block}", torch.zeros(width, device=None if known is None else known.device))

    def of(self, block: int, width: int) -> Tensor:
        """The mean input of a block, (D,)."""
        mean: Tensor = getattr(self, f"mean_{block}")
        # A block is added with its first layer by name: another one may be the first to run.
        return mean if len(mean) == width else mean.new_zeros(width)

    @torch.no_grad()
    def measure(self, block: int, x: Tensor, mask: Tensor | None) -> None:
        """Take the mean of ``x`` (..., D) if the block has none yet.

        The sum is one product: in half precision it is right to three digits, which is what centring needs.

        Args:
            mask: real tokens, of as many entries as ``x`` has tokens; all if None.
        """
        if block in self._known:
            return
        if len(getattr(self, f"mean_{block}")) != x.shape[-1]:
            self.add_block(block, x.shape[-1])
        mean = self.of(block, x.shape[-1])
        # Asked once a process, because it stops a GPU; a tensor without numbers, with which steps are traced, has none.
        if type(mean) is Tensor and mean.any():
            self._known.add(block)
            return
        rows = x.flatten(0, -2)
        weights = x.new_ones(1, len(rows), dtype=torch.float32)
        if mask is not None and mask.numel() == len(rows):
            weights = mask.to(weights).reshape(1, -1)
        count = weights.sum()
        found = over_all_processes(((weights / count).to(x.dtype) @ rows)[0].to(mean), count)
        # A pass with overflow measures nothing: the next one will.
        mean.copy_(torch.where(found.isfinite().all(), found, mean))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._known.clear()
        for name, mean in list(self._buffers.items()):
            stored = state_dict.get(prefix + name)
            if mean is not None and stored is not None and stored.shape != mean.shape:
                self.register_buffer(name, mean.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def over_all_processes(mean: Tensor, count: Tensor) -> Tensor:
    """The mean over the tokens of all processes, of each one's ``mean`` over ``count`` tokens."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return mean
    total = torch.cat([mean * count.to(mean), count.to(mean).view(1)])
    distributed.all_reduce(total)
    return total[:-1] / total[-1]


def centered(z: Tensor, of_mean: Tensor) -> Tensor:
    """``A (x - mean)`` over its root mean square, (..., R).

    Args:
        z: ``A x``, (..., R), float32.
        of_mean: ``A mean``, (R,), float32.
    """
    state = z - of_mean
    scale = torch.addcmul(state.square(), z, z, value=ROUNDING).mean(dim=-1, keepdim=True)
    return state * torch.rsqrt(scale + EPS)
