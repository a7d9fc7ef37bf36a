"""Attention over short rows in training on a CPU, written out.

Letters: B rows, H query heads, G key heads, Q query heads a key head, T tokens, N tokens of a sequence, D head width.

torch's fused kernel is made for long rows, and for many of them; four batched products written out are faster over
short ones. What they cost are the T x T weights, which the fused kernel never holds: so calls whose weights would go
beyond a layer's limit are left to it (in bfloat16 to :mod:`qmemtune.models.row_attention`). Short neighbours of a
sequence are padded for such a call, and only for it; their weights take no more than a query whose heads are as wide as
the longest of them. Forward and backward of a layer, 9 heads of width 64 of which 3 are key heads, in ms:

=========================  ======  ==========  =============  =======================  ================
machine                    rows    fused, and  written out,   one behind the other,    written out over
                                   padded      and padded     fused, a call for each   neighbours
=========================  ======  ==========  =============  =======================  ================
1 AVX-512 core, bfloat16   16x26   12.4        2.0
1 AVX-512 core, bfloat16   8x200   65          28
2 AVX2 cores, float32      16x13   3.9         1.4            5.7                      2.1
2 AVX2 cores, float32      16x30   10          3.8            8.8                      5.8
2 AVX2 cores, float32      8x60    12          5.7            9.5                      6.8
2 AVX2 cores, float32      8x120   28          22             23                       22
2 AVX2 cores, float32      8x200   38          32             40                       32
=========================  ======  ==========  =============  =======================  ================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_BYTES = 8 * 2**20
"""Weights that one layer may keep for its backward pass, in bytes; those of short neighbours are not counted."""
CONTIGUOUS = torch.contiguous_format


def causal_mask(tokens: int, device: torch.device | str) -> Tensor:
    """(T, T), True where a token may look."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


class _ShortAttention(torch.autograd.Function):
    """``softmax(scale * q k^T + bias) v``; q (B, H, T, D), k and v (B, G, T, D), bias (B, 1, 1, T, T).

    The result is (B, T, H, D) and contiguous, and the gradients are stored in this order too: what comes before and
    after are products over (B * T, H * D). With slots, q, k, v and the result are over N tokens of one sequence,
    (1, H, N, D), (1, G, N, D) and (1, N, H, D), and the slots say which of the B * T each token takes.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, slots: Tensor | None) -> Tensor:
        rows, tokens = len(bias), bias.shape[-1]
        q, k, v = (spread(x, slots, rows, tokens) for x in (q, k, v))
        heads, width = q.shape[1], q.shape[3]
        groups = (k.shape[1], heads // k.shape[1])
        # Scores in float32, as in the fused kernel: bfloat16 keeps too few digits of a large score. With a result that
        # is there already, autocast leaves the product alone.
        dtype = torch.promote_types(q.dtype, torch.float32)
        queries = by_key_head(q, groups, dtype)
        keys = k.to(dtype).flatten(0, 1).transpose(1, 2)
        scores = queries.new_empty(len(queries), queries.shape[1], tokens)
        scores.view(rows, *groups, tokens, tokens).copy_(bias)
        torch.baddbmm(scores, queries, keys, alpha=scale, out=scores)
        torch.softmax(scores, dim=-1, out=scores)
        weights = scores.to(q.dtype)
        mixed = torch.bmm(weights, v.flatten(0, 1))
        result = q.new_empty(rows, tokens, heads, width)
        result.copy_(mixed.view(q.shape).transpose(1, 2))
        ctx.save_for_backward(q, k, v, weights, slots)
        ctx.scale = scale
        return joined(result, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, slots = ctx.saved_tensors
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        grad_q, grad_k, grad_v = (torch.empty_like(x.transpose(1, 2), memory_format=CONTIGUOUS) for x in (q, k, v))
        mixed = by_key_head(spread(grad.transpose(1, 2), slots, len(q), q.shape[2]), groups, grad.dtype)
        wide, narrow_k, narrow_v = gradients(
            weights, mixed, by_key_head(q, groups, q.dtype), k.flatten(0, 1), v.flatten(0, 1)
        )
        torch.mul(wide.view(q.shape).transpose(1, 2), ctx.scale, out=grad_q)
        torch.mul(narrow_k.view(k.shape).transpose(1, 2), ctx.scale, out=grad_k)
        grad_v.copy_(narrow_v.view(k.shape).transpose(1, 2))
        return *(joined(x, slots).transpose(1, 2) for x in (grad_q, grad_k, grad_v)), None, None, None


def gradients(
    weights: Tensor, mixed: Tensor, queries: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (n, t, D), keys (n, S, D) and values (n, S, D), the first two before the scale.

    Args:
        weights: (n, t, S), what each query takes of each value.
        mixed: the result's gradient, (n, t, D).
    """
    grad_values = torch.bmm(weights.transpose(1, 2), mixed)
    grad_weights = torch.bmm(mixed, values.transpose(1, 2))
    scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    return torch.bmm(scores, keys), torch.bmm(scores.transpose(1, 2), queries), grad_values


def spread(heads: Tensor, slots: Tensor | None, rows: int, tokens: int) -> Tensor:
    """(1, H, N, D) as rows of T tokens, (B, H, T, D), zero where no token is; as it is if there are no slots (N,)."""
    if slots is None:
        return heads
    made = heads.new_zeros(rows * tokens, heads.shape[1], heads.shape[3])
    return made.index_copy_(0, slots, heads[0].transpose(0, 1)).unflatten(0, (rows, tokens)).transpose(1, 2)


def joined(rows: Tensor, slots: Tensor | None) -> Tensor:
    """(B, T, H, D) as one sequence, (1, N, H, D); as it is if there are no slots (N,)."""
    return rows if slots is None else rows.flatten(0, 1).index_select(0, slots)[None]


def by_key_head(heads: Tensor, groups: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) as (B * G, Q * T, D), contiguous and in a type; what each key head is compared with."""
    made = torch.empty(len(heads), *groups, *heads.shape[2:], dtype=dtype, device=heads.device)
    return made.copy_(heads.unflatten(1, groups)).view(-1, groups[1] * heads.shape[2], heads.shape[3])


def attention_bias(mask: Tensor | None, query: Tensor) -> Tensor:
    """What is added to the scores, (B or 1, 1, 1, T, T) float32: 0 where a token may look, very low elsewhere.

    Args:
        mask: (B, 1, T, T), True where a token may look, or already added numbers; None for plain causal attention.
        query: (B, H, T, D).
    """
    tokens = query.shape[2]
    if mask is None:
        mask = causal_mask(tokens, query.device)[None, None]
    if mask.dtype == torch.bool:
        # Not minus infinity: a padded token that may look nowhere would be no number, and so would its gradient.
        mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float32).min / 2)
    return mask.float()[:, :, None]


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, slots: Tensor | None = None
) -> Tensor:
    """Attention over short rows, with gradients.

    Args:
        query: (B, H, T, D), or (1, H, N, D) with slots.
        key: (B, G, T, D), or (1, G, N, D).
        value: as the key.
        mask: see :func:`attention_bias`; (B, 1, T, T) with slots.
        slots: (N,), for rows that stand one behind the other: which of the B * T each token takes.

    Returns:
        (B, T, H, D), or (1, N, H, D), contiguous.
    """
    bias = attention_bias(mask, query).expand(len(query) if slots is None else -1, -1, -1, -1, -1)
    mixed: Tensor = _ShortAttention.apply(query, key, value, bias, scale, slots)
    return mixed


def is_meant(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether :func:`short_attention` computes such a call of transformers' attention."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype != torch.float16
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("softcap") is None
    )


def is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether this attention is causal where no mask says otherwise."""
    causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def is_short(module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether :func:`short_attention` is faster, for a call that it is meant for."""
    tokens = query.shape[2]
    # The fused kernel takes as long over one row, except in bfloat16.
    if len(query) == 1 and query.dtype != torch.bfloat16:
        return False
    if mask is None:
        return is_causal(module, options)
    return mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2:] == (tokens, tokens)


def may_keep(query: Tensor, pairs: Sequence[int]) -> list[bool]:
    """Which of a layer's calls may keep their weights: in their order those that stay below the limit together.

    Args:
        query: of the layer, (B, H, N, D).
        pairs: of a query and a key in each call.
    """
    left, kept = MOST_BYTES, []
    for count in pairs:
        own = query.shape[1] * count * query.element_size()
        kept.append(own <= left)
        left -= own if kept[-1] else 0
    return kept


def scale_of(query: Tensor, options: dict[str, Any]) -> float:
    """What scores are multiplied by."""
    scale: float | None = options.get("scaling")
    return query.shape[-1] ** -0.5 if scale is None else scale
