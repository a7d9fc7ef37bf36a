"""Attention in training: over rows that stand one behind the other, and over short rows on a CPU in bfloat16.

Letters: B rows, H query heads, G key heads, Q query heads a key head, T tokens, D head width.

**Rows one behind the other** make a batch without padding: one sequence with the tokens of all rows, and positions that
begin again with each. transformers keeps them apart with a mask of all tokens against all; here each row has its
attention alone, in a call of its own. What a token may see within its row (a window, a chunk) is still what
transformers' mask function says.

**Short rows.** torch's fused kernel is made for long rows. In bfloat16 its backward pass takes most of the time of a
short one: 16 rows of 26 tokens, 9 heads of width 64, one AVX-512 core: 1.9 ms forward and 10.5 ms backward, against 1.0
and 1.0 ms for the four batched products written out below; 8 rows of 200 tokens: 17 and 48 ms against 14 and 14. What
it costs are the T x T weights, which the fused kernel never holds: so a layer whose weights take more than a limit is
left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MOST_BYTES = 8 * 2**20
"""Weights that one layer may keep for its backward pass, in bytes."""
KERNEL = "sdpa"
CONTIGUOUS = torch.contiguous_format
ROWS = "qmemtune_rows"
"""Attribute of a mask that stands for rows one behind the other: what each of them may see."""
_lengths: ContextVar[Sequence[int] | None] = ContextVar("lengths of the rows of the running pass", default=None)


@dataclass(frozen=True)
class Row:
    """One of the rows that stand one behind the other."""

    tokens: int
    mask: Tensor | None = None
    """(1, 1, T, T), True where a token may look; None for plain causal attention."""


@contextmanager
def rows_of(lengths: Sequence[int] | None) -> Iterator[None]:
    """While open, a forward pass over one sequence (1, T) is over rows of these lengths, in tokens, in this order.

    The model still has to be given their positions, which keep rows apart where :func:`training_attention` is not
    open. None for an ordinary batch.
    """
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def mask_of_rows(rows: Sequence[Row], device: torch.device | str) -> Tensor:
    """What is handed through a model as its mask, (1, 1, T, T), a view of one True; :data:`ROWS` holds the rows."""
    tokens = sum(row.tokens for row in rows)
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(1, 1, tokens, tokens)
    setattr(mask, ROWS, tuple(rows))
    return mask


def masks_by_row(plain: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """transformers' function that makes masks, which inside :func:`rows_of` makes one a row."""

    def made(*args: Any, **options: Any) -> Tensor | None:
        lengths = _lengths.get()
        whole = [options.get(name) for name in ("batch_size", "q_length", "kv_length")]
        if lengths is None or len(lengths) < 2 or args or whole != [1, sum(lengths), sum(lengths)]:
            return plain(*args, **options)
        if options.get("attention_mask") is not None or options.get("q_offset") or options.get("kv_offset"):
            return plain(**options)
        device = options.get("device", "cpu")
        causal = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=device).tril()
        rows, start = [], 0
        for tokens in lengths:
            part = {"q_length": tokens, "kv_length": tokens, "q_offset": start, "kv_offset": start}
            mask = plain(**{**options, **part, "allow_is_causal_skip": False})
            plainly = mask is None or torch.equal(mask[0, 0], causal[:tokens, :tokens])
            rows.append(Row(tokens, None if plainly else mask))
            start += tokens
        return mask_of_rows(rows, device)

    return made


class _ShortAttention(torch.autograd.Function):
    """``softmax(scale * q k^T + bias) v``; q (B, H, T, D), k and v (B, G, T, D), bias (B, 1, 1, T, T).

    The result is (B, T, H, D) and contiguous, and the gradients are stored in this order too: what comes before and
    after are products over (B * T, H * D).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        rows, heads, tokens, width = q.shape
        groups = (k.shape[1], heads // k.shape[1])
        result = q.new_empty(rows, tokens, heads, width)
        # Scores in float32, as in the fused kernel: bfloat16 keeps too few digits of a large score. With a result that
        # is there already, autocast leaves the product alone.
        queries = by_key_head(q, groups, torch.float32)
        keys = k.to(torch.float32, memory_format=CONTIGUOUS).mul_(scale).flatten(0, 1)
        scores = queries.new_empty(len(queries), queries.shape[1], tokens)
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        scores.view(rows, *groups, tokens, tokens).add_(bias)
        torch.softmax(scores, dim=-1, out=scores)
        weights = scores.to(q.dtype)
        mixed = torch.bmm(weights, v.flatten(0, 1))
        result.copy_(mixed.view(q.shape).transpose(1, 2))
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        grad_q, grad_k, grad_v = (torch.empty_like(x.transpose(1, 2), memory_format=CONTIGUOUS) for x in (q, k, v))
        keys = k.flatten(0, 1)
        mixed = by_key_head(grad.transpose(1, 2), groups, grad.dtype)
        narrow = torch.bmm(weights.transpose(1, 2), mixed)
        grad_v.copy_(narrow.view(k.shape).transpose(1, 2))
        grad_weights = torch.bmm(mixed, v.flatten(0, 1).transpose(1, 2))
        scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        wide = torch.bmm(scores, keys).view(q.shape)
        torch.mul(wide.transpose(1, 2), ctx.scale, out=grad_q)
        narrow = torch.bmm(scores.transpose(1, 2), by_key_head(q, groups, q.dtype))
        torch.mul(narrow.view(k.shape).transpose(1, 2), ctx.scale, out=grad_k)
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), None, None


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
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        # Not minus infinity: a padded token that may look nowhere would be no number, and so would its gradient.
        mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float32).min / 2)
    return mask.float()[:, :, None]


def short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention over short rows, with gradients.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D).
        value: (B, G, T, D).
        mask: see :func:`attention_bias`.

    Returns:
        (B, T, H, D), contiguous.
    """
    bias = attention_bias(mask, query).expand(len(query), -1, -1, -1, -1)
    mixed: Tensor = _ShortAttention.apply(query, key, value, bias, scale)
    return mixed


def is_short(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether :func:`short_attention` computes this call of transformers' attention, and faster."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    tokens = query.shape[2]
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and tokens == key.shape[2]
        and query.shape[:3].numel() * tokens * query.element_size() <= MOST_BYTES
        and query.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and (causal if mask is None else mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2:] == (tokens, tokens))
    )


@contextmanager
def training_attention() -> Iterator[None]:
    """While open, models with transformers' ``sdpa`` attention have this module's, for what it is meant for."""
    fused, masks = ALL_ATTENTION_FUNCTIONS[KERNEL], ALL_MASK_ATTENTION_FUNCTIONS[KERNEL]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        rows: tuple[Row, ...] | None = getattr(attention_mask, ROWS, None)
        if rows is not None:
            lengths = [row.tokens for row in rows]
            parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), rows, strict=True)
            made = [attention(module, q, k, v, row.mask, **options)[0] for q, k, v, row in parts]
            return torch.cat(made, dim=1), None
        if is_short(module, query, key, value, attention_mask, options):
            scale = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            return short_attention(query, key, value, attention_mask, scale), None
        result: tuple[Tensor, Tensor | None] = fused(module, query, key, value, attention_mask, **options)
        return result

    ALL_ATTENTION_FUNCTIONS[KERNEL] = attention
    ALL_MASK_ATTENTION_FUNCTIONS[KERNEL] = masks_by_row(masks)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[KERNEL] = fused
        ALL_MASK_ATTENTION_FUNCTIONS[KERNEL] = masks
