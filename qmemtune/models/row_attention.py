"""Causal attention over rows too long to keep their weights, in bfloat16 training on a CPU.

The forward pass is torch's fused kernel. Its backward pass takes three times as long as the forward pass, since it
multiplies small tiles; here it is batched products over a block of queries at a time, whose weights are made again from
the inputs and each query's sum of exponentials. Both passes of a row's layer, in ms, on two cores with AVX-512 and
bfloat16 (Zen 4):

======  ==========================  ============================
tokens  9 heads of width 64, of     32 heads of width 64, of
        which 3 are key heads       which 8 are key heads
======  ==========================  ============================
192     fused 3.8 to 4.8, here 2.6  fused 10 to 14, here 10 to 11
384     fused 13 to 14, here 10     fused 37 to 40, here 29
512     fused 17 to 23, here 12 to  fused 55 to 58, here 38
        15
1,024   fused 42 to 46, here 37 to  fused 132 to 140, here 134
        45
======  ==========================  ============================

Training SmolLM2-135M on 8 Alpaca rows a step, of up to 512 tokens, makes 1.15 times as many tokens a second (two runs
of five steps each way, in turns: 312 and 305 for 271 and 265).

Letters as in :mod:`qmemtune.models.short_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qmemtune.models.short_attention import CONTIGUOUS, by_key_head, causal_mask, gradients, is_causal

LONGEST = 1024
"""Tokens of a row beyond which the fused kernel takes no longer."""
SMALLEST = 64
"""Queries of the smallest block."""
AT_ONCE = 1152
"""Queries of all heads in a block, about: fewer leave out more of the keys that a query may not see, more make larger
products, whose weights do not stay in the cache."""


class _RowAttention(torch.autograd.Function):
    """``softmax(scale * q k^T) v``, causal; q (B, H, T, D), k and v (B, G, T, D), result (B, T, H, D) contiguous."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed, log_sums = kernel(q, k, v, 0.0, True, scale=scale)
        result: Tensor = mixed.transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, log_sums)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sums = ctx.saved_tensors
        # Stored as (B, T, H, D), for the products over (B * T, H * D) that come next.
        grad_q, grad_k, grad_v = (
            torch.empty_like(x.transpose(1, 2), memory_format=CONTIGUOUS).transpose(1, 2) for x in (q, k, v)
        )
        for row in range(len(q)):
            inputs = (x[row : row + 1] for x in (q, k, v, log_sums, grad.transpose(1, 2)))
            _back(*inputs, *(x[row] for x in (grad_q, grad_k, grad_v)), scale=ctx.scale)
        return grad_q, grad_k, grad_v, None


def _back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_sums: Tensor,
    grad: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    *,
    scale: float,
) -> None:
    """One row's gradients, put into ``grad_q``, ``grad_k`` and ``grad_v``, (H, T, D) and (G, T, D).

    Shapes: q and grad (1, H, T, D), k and v (1, G, T, D), log_sums (1, H, T) float32.
    """
    tokens, groups = q.shape[2], (k.shape[1], q.shape[1] // k.shape[1])
    narrow_k, narrow_v = k[0].contiguous(), v[0].contiguous()
    # Scores in float32, see _ShortAttention.
    keys = narrow_k.float().transpose(1, 2)
    sum_k, sum_v = torch.zeros_like(narrow_k, dtype=torch.float32), torch.zeros_like(narrow_v, dtype=torch.float32)
    block = block_of(q.shape[1])
    later = causal_mask(min(block, tokens), q.device).logical_not_()
    # From the longest block to the shortest: each fits into the memory of the one before.
    for start in reversed(range(0, tokens, block)):
        stop = min(start + block, tokens)
        size = stop - start
        queries = by_key_head(q[:, :, start:stop], groups, q.dtype)
        wide = by_key_head(grad[:, :, start:stop], groups, grad.dtype)
        scores = torch.empty(*groups, size, stop, dtype=torch.float32, device=q.device)
        scores.copy_(log_sums[0, :, start:stop].unflatten(0, groups).unsqueeze(-1)).neg_()
        scores[..., start:].masked_fill_(later[:size, :size], -torch.inf)
        flat = scores.view(groups[0], -1, stop)
        torch.baddbmm(flat, queries.float(), keys[:, :, :stop], alpha=scale, out=flat)
        weights = flat.exp_().to(q.dtype)
        grad_queries, grad_keys, grad_values = gradients(weights, wide, queries, narrow_k[:, :stop], narrow_v[:, :stop])
        torch.mul(grad_queries.view(-1, size, q.shape[3]), scale, out=grad_q[:, start:stop])
        sum_k[:, :stop] += grad_keys
        sum_v[:, :stop] += grad_values
    grad_k.copy_(sum_k.mul_(scale))
    grad_v.copy_(sum_v)


def block_of(heads: int) -> int:
    """Queries of a block."""
    return max(AT_ONCE // heads // SMALLEST, 1) * SMALLEST


def row_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention over each row, with gradients.

    Args:
        query: (B, H, T, D) bfloat16.
        key: (B, G, T, D).
        value: as the key.

    Returns:
        (B, T, H, D), contiguous.
    """
    mixed: Tensor = _RowAttention.apply(query, key, value, scale)
    return mixed


def is_row(module: nn.Module, query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether :func:`row_attention` computes such a call, which :func:`is_meant` holds for, and is faster."""
    meant = query.dtype == torch.bfloat16 and query.shape[2] <= LONGEST
    return meant and mask is None and is_causal(module, options)
