"""The arithmetic of a route, free of any state.

Tensor letters: R rank, M atoms, K key width, J earlier blocks; ``...`` are the tokens of a layer's input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qmemtune.adapters.queryable.apply import apply_operator, routed_product


def stack_states(states: list[Tensor], query: Tensor) -> Tensor:
    """States of earlier blocks for the tokens of ``query`` (..., K), as (..., J, K).

    Raises:
        RuntimeError: they are states of other tokens.
    """
    if any(state.shape.numel() != query.shape.numel() for state in states):
        raise RuntimeError(
            f"an adapted layer sees tokens of shape {tuple(query.shape[:-1])}, layers before it saw "
            f"{tuple(states[0].shape[:-1])}: leave it out with exclude_modules, or set depth_summary=False"
        )
    return torch.stack([state.to(query.device).reshape(query.shape) for state in states], dim=-2)


QUERY_EPS = 0.1
"""Added to a query's mean square (about 1 at the start): a query near zero has no direction to be blown up, and would
make rounding errors visible."""


def rms_norm(z: Tensor, eps: float = 1e-6) -> Tensor:
    """``z / rms(z)`` over the last dimension."""
    return F.rms_norm(z, z.shape[-1:], eps=eps)


def normed_state(z: Tensor, routed: Tensor) -> Tensor:
    """``h = rmsnorm(C z)``. Shapes: z (..., R), routed operator C (..., R, R)."""
    return rms_norm(apply_operator(z, routed) if torch.is_grad_enabled() else routed_product(routed, z))


def routed_operator(weights: Tensor, core: Tensor) -> Tensor:
    """``C = I + sum_m w_m Delta_m``. Shapes: weights (..., M), core (M, R, R); result (..., R, R)."""
    update = (weights @ core.flatten(1)).unflatten(-1, core.shape[1:])
    # In place on a fresh tensor: adding a whole identity would walk over all of it once more.
    update.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return update


def attend(query: Tensor, states: Tensor) -> Tensor:
    """Attention of one query over the states of earlier blocks. Shapes: query (..., K), states (..., J, K)."""
    scores = (states @ query.unsqueeze(-1)).squeeze(-1) / math.sqrt(query.shape[-1])
    return (scores.softmax(dim=-1).unsqueeze(-2) @ states).squeeze(-2)


def top_k_softmax(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax over the ``top_k`` largest logits (all if None); the others get exactly zero. Shape (..., M)."""
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1).indices
        mask = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
        logits = logits.masked_fill(mask, float("-inf"))
    return logits.softmax(dim=-1)


def own_atoms(logits: Tensor, block: int, num_blocks: int, elsewhere: float) -> Tensor:
    """Logits (..., M) of one block's own M / ``num_blocks`` atoms; ``elsewhere`` for the others."""
    share = logits.shape[-1] // num_blocks
    own = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    own[block * share : (block + 1) * share] = True
    return logits.masked_fill(~own, elsewhere)
