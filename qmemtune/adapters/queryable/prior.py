"""The arithmetic of the instruction prior, free of any state.

Tensor letters: B rows, M atoms, K key width, E instruction embedding; ``...`` are the tokens of a layer's input.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def moved(start: float, final: float | None, progress: float) -> float:
    """A value on its straight way from ``start`` to ``final``; ``start`` if it has no final value.

    Args:
        progress: share of the way that is done, 0 to 1.
    """
    return start if final is None else start + (final - start) * progress


def rows_of(given: Tensor, rows: int) -> Tensor:
    """Instruction embeddings (b, E), each repeated for the neighbouring rows that share it, as (``rows``, E).

    Raises:
        RuntimeError: ``rows`` is no multiple of b.
    """
    if rows % given.shape[0]:
        raise RuntimeError(f"{given.shape[0]} instructions were given for a batch of {rows} rows")
    return given.repeat_interleave(rows // given.shape[0], dim=0)


def log_prior(given: Tensor, projection: Tensor, key: Tensor, temperature: float) -> Tensor:
    """``log p(m | u)``, (B, M); zeros, hence no effect, for a row whose embedding is zero.

    Args:
        given: instruction embeddings, (B, E).
        projection: (K, E).
        key: (M, K).
        temperature: divides the logits.
    """
    logits = F.linear(F.linear(given, projection), key) / temperature
    # Rows without an instruction multiply by zero instead of leaving out: every parameter takes part in every batch,
    # which data-parallel training needs.
    present = (given != 0).any(dim=-1, keepdim=True)
    return F.log_softmax(logits, dim=-1) * present


def divergence_from_prior(logits: Tensor, prior: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean KL(route without prior || prior) over real tokens of rows with an instruction, a scalar.

    Args:
        logits: of the route, (B, ..., M).
        prior: from :func:`log_prior`, with dimensions of size 1 for the tokens: (B, 1..., M).
        token_mask: (B, T), zero at padding; all tokens count without it, or where they are other tokens.
    """
    log_route = F.log_softmax(logits, dim=-1)
    each = (log_route.exp() * (log_route - prior)).sum(dim=-1)
    weight = (prior != 0).any(dim=-1).expand(each.shape).to(each.dtype)
    if token_mask is not None and token_mask.shape == each.shape:
        weight = weight * token_mask.to(weight)
    return (each * weight).sum() / weight.sum().clamp_min(1.0)
