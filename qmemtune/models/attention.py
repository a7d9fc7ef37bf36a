"""Attention in training: which rows of a batch or a sequence are compared, and by which kernel.

Letters: B rows, H query heads, T tokens, N tokens of a sequence, D head width.

**Rows one behind the other** make a batch without padding: one sequence with the tokens of all rows, and positions that
begin again with each. transformers keeps them apart with a mask of all tokens against all; here each row has its
attention alone, in a call of its own, or short neighbours in one call that pads them (models.short_attention). What a
token may see within its row (a window, a chunk) is still what transformers' mask function says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qmemtune.models.row_attention import is_row, row_attention
from qmemtune.models.short_attention import causal_mask, is_meant, is_short, may_keep, scale_of, short_attention

KERNEL = "sdpa"
SHORT = 64
"""Tokens of the longest row of a sequence that is padded together with its neighbours."""
MOST_SPREAD = 1.5
"""Tokens of such rows with their padding, for each of their own."""
SPANS = "qmemtune_spans"
"""Attribute of a mask that stands for rows one behind the other: the calls of attention, and what each may see."""
_lengths: ContextVar[Sequence[int] | None] = ContextVar("lengths of the rows of the running pass", default=None)


@dataclass(frozen=True)
class Span:
    """Rows of a sequence: one, or short neighbours, which have one call of attention."""

    lengths: tuple[int, ...]
    """Of the rows, in tokens."""
    masks: tuple[Tensor | None, ...]
    """Of each row (1, 1, T, T), True where a token may look; None for plain causal attention."""
    mask: Tensor | None = None
    """(B, 1, T, T) with the longest row's tokens, where there are several rows."""
    slots: Tensor | None = None
    """(N,), which of the B * T each token takes."""

    @classmethod
    def of(cls, lengths: Sequence[int], masks: Sequence[Tensor | None], causal: Tensor) -> Span:
        """Rows of these lengths and with these masks.

        Args:
            causal: (T, T), at least the longest row's tokens; True where a token may look.
        """
        if len(lengths) == 1:
            return cls(tuple(lengths), tuple(masks))
        longest = max(lengths)
        mask = causal[:longest, :longest].repeat(len(lengths), 1, 1, 1)
        for row, (tokens, own) in enumerate(zip(lengths, masks, strict=True)):
            if own is not None:
                mask[row, :, :tokens, :tokens] = own[0]
        slots = [torch.arange(tokens, device=causal.device) + row * longest for row, tokens in enumerate(lengths)]
        return cls(tuple(lengths), tuple(masks), mask, torch.cat(slots))


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


def by_span(lengths: Sequence[int], *, together: bool) -> list[list[int]]:
    """Lengths of rows, in tokens and in their order, by the span that the rows are in; each alone if not together."""
    found: list[list[int]] = []
    for tokens in lengths:
        span = [*found[-1], tokens] if found else [tokens]
        if together and len(span) > 1 and max(span) <= SHORT and max(span) * len(span) <= MOST_SPREAD * sum(span):
            found[-1] = span
        else:
            found.append([tokens])
    return found


def mask_of_rows(
    lengths: Sequence[int],
    device: torch.device | str,
    of_row: Callable[[int, int], Tensor | None] | None = None,
    *,
    together: bool,
) -> Tensor:
    """What is handed through a model as its mask, (1, 1, N, N), a view of one True; :data:`SPANS` holds the spans.

    Args:
        lengths: of rows that stand one behind the other, in tokens.
        device: of the model's tokens.
        of_row: takes a row's first token and its number of tokens, and returns the mask of the row (1, 1, T, T), True
            where a token may look; plain causal attention for all if not given.
        together: whether short neighbours have one call of attention.
    """
    causal = causal_mask(max(lengths), device)
    spans, start = [], 0
    for rows in by_span(lengths, together=together):
        masks: list[Tensor | None] = []
        for tokens in rows:
            mask = of_row(start, tokens) if of_row is not None else None
            plain = mask is None or torch.equal(mask[0, 0], causal[:tokens, :tokens])
            masks.append(None if plain else mask)
            start += tokens
        spans.append(Span.of(rows, masks, causal))
    whole = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).expand(1, 1, start, start)
    setattr(whole, SPANS, tuple(spans))
    return whole


def masks_by_row(plain: Callable[..., Tensor | None], *, written_out: bool) -> Callable[..., Tensor | None]:
    """transformers' function that makes masks, which inside :func:`rows_of` makes one a row."""

    def made(*args: Any, **options: Any) -> Tensor | None:
        lengths = _lengths.get()
        whole = [options.get(name) for name in ("batch_size", "q_length", "kv_length")]
        if lengths is None or len(lengths) < 2 or args or whole != [1, sum(lengths), sum(lengths)]:
            return plain(*args, **options)
        if options.get("attention_mask") is not None or options.get("q_offset") or options.get("kv_offset"):
            return plain(**options)

        def of_row(start: int, tokens: int) -> Tensor | None:
            part = {"q_length": tokens, "kv_length": tokens, "q_offset": start, "kv_offset": start}
            return plain(**{**options, **part, "allow_is_causal_skip": False})

        device = torch.device(options.get("device", "cpu"))
        together = written_out and device.type == "cpu" and torch.is_grad_enabled()
        return mask_of_rows(lengths, device, of_row, together=together)

    return made


@contextmanager
def training_attention(*, written_out: bool = True) -> Iterator[None]:
    """While open, models with transformers' ``sdpa`` attention have this module's, for what it is meant for.

    Args:
        written_out: let short rows have it too; on a CPU only, where False stands for another device.
    """
    fused, masks = ALL_ATTENTION_FUNCTIONS[KERNEL], ALL_MASK_ATTENTION_FUNCTIONS[KERNEL]

    def one_call(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        kept: bool,
    ) -> Tensor:
        if written_out and is_meant(query, key, value, options):
            if kept and is_short(module, query, mask, options):
                return short_attention(query, key, value, mask, scale_of(query, options))
            if is_row(module, query, mask, options):
                return row_attention(query, key, value, scale_of(query, options))
        mixed: Tensor = fused(module, query, key, value, mask, **options)[0]
        return mixed

    def over_span(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span: Span,
        options: dict[str, Any],
        kept: bool,
    ) -> Tensor:
        if span.slots is not None and written_out and is_meant(query, key, value, options):
            return short_attention(query, key, value, span.mask, scale_of(query, options), span.slots)
        parts = zip(*(parts_of(tensor, span.lengths) for tensor in (query, key, value)), span.masks, strict=True)
        causal = {**options, "is_causal": True}
        return one_behind_the_other([
            one_call(module, q, k, v, mask, causal if mask is None else options, kept) for q, k, v, mask in parts
        ])  # fmt: skip

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        spans: tuple[Span, ...] | None = getattr(attention_mask, SPANS, None)
        if spans is None:
            if attention_mask is not None and is_bare(attention_mask):
                raise RuntimeError("rows of one sequence would see each other: their mask came without the rows")
            (kept,) = may_keep(query, [len(query) * query.shape[2] ** 2])
            return one_call(module, query, key, value, attention_mask, options, kept), None
        # Weights of short neighbours are not counted.
        keeps = may_keep(query, [span.lengths[0] ** 2 if span.slots is None else 0 for span in spans])
        lengths = [sum(span.lengths) for span in spans]
        parts = zip(*(parts_of(tensor, lengths) for tensor in (query, key, value)), spans, keeps, strict=True)
        made = [over_span(module, q, k, v, span, options, kept) for q, k, v, span, kept in parts]
        return one_behind_the_other(made), None

    ALL_ATTENTION_FUNCTIONS[KERNEL] = attention
    ALL_MASK_ATTENTION_FUNCTIONS[KERNEL] = masks_by_row(masks, written_out=written_out)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[KERNEL] = fused
        ALL_MASK_ATTENTION_FUNCTIONS[KERNEL] = masks


def is_bare(mask: Tensor) -> bool:
    """Whether this is a mask of :func:`mask_of_rows`, which a copy leaves without its rows."""
    return mask.dim() == 4 and mask.numel() > 1 and mask.stride()[2:] == (0, 0)


def parts_of(tensor: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """What belongs to each of the rows of these lengths, of a tensor (B, H, N, D)."""
    # The backward pass of a split copies, even of one into one part.
    return (tensor,) if len(lengths) == 1 else tensor.split(list(lengths), dim=2)


def one_behind_the_other(parts: Sequence[Tensor]) -> Tensor:
    """Results of attention (1, T, H, D) as one (1, N, H, D)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
