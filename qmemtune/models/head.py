"""The way from a causal language model's hidden states to its logits: output head, and what comes after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Transform = Callable[[Tensor], Tensor]
"""What a model does to its head's output."""


def unchanged(logits: Tensor) -> Tensor:
    """The transform of a model that takes its head's output as it is."""
    return logits


def output_head(lm: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model tells."""
    get = getattr(lm, "get_output_embeddings", None)
    head = get() if get is not None else None
    return head if isinstance(head, nn.Module) else None


def keep_head_input_contiguous(lm: nn.Module) -> list[RemovableHandle]:
    """Let the output head see contiguous hidden states only.

    The last position of each row, cut out of (B, T, D), is not contiguous. torch's ``matmul`` then multiplies batch by
    batch and on a CPU copies the head's weight for every row before it does: 7 GiB for 128 rows of a 135M model.

    Returns:
        handles that undo it; none for a model without a head.
    """
    head = output_head(lm)
    return [] if head is None else [head.register_forward_pre_hook(contiguous_input)]


def contiguous_input(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if args and isinstance(args[0], Tensor) and not args[0].is_contiguous():
        return (args[0].contiguous(), *args[1:])
    return None


def decoder_of(lm: nn.Module) -> nn.Module:
    """The module that turns token ids into the hidden states that the output head reads."""
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None  # type: ignore[operator]
    return lm.base_model if decoder is None or decoder is lm else decoder  # type: ignore[return-value]


def transform_candidates(lm: nn.Module) -> list[Transform]:
    """What models are known to do to the head's output: nothing, a soft cap (Gemma 2), a factor (Cohere, Granite)."""
    config = getattr(lm, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    candidates: list[Transform] = [unchanged]
    cap = getattr(text_config, "final_logit_softcapping", None)
    if cap:
        candidates.append(lambda logits: torch.tanh(logits / cap) * cap)
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        factor = getattr(text_config, name, None)
        if isinstance(factor, int | float) and factor not in (0, 1):
            candidates.append(lambda logits, factor=factor: logits * factor)  # type: ignore[misc]
            candidates.append(lambda logits, factor=factor: logits / factor)  # type: ignore[misc]
    return candidates


def matching_transform(lm: nn.Module, raw: Tensor, expected: Tensor, *, tolerance: float = 0.0) -> Transform | None:
    """The candidate that makes the model's own logits of the head's output, or None when none does.

    The model is tried rather than trusted: a family that treats its logits in a new way must not be trained or
    measured on other logits than it will be used with.

    Args:
        raw: the head's output at some positions, (..., V).
        expected: the model's logits there.
        tolerance: largest difference allowed, relative and absolute.
    """
    for candidate in transform_candidates(lm):
        found = candidate(raw)
        if found.shape == expected.shape and torch.allclose(
            found.float(), expected.float(), rtol=tolerance, atol=tolerance
        ):
            return candidate
    return None


PROBED = (1, 4)
"""Rows and tokens that :func:`find_transform` looks at."""


@torch.no_grad()
def find_transform(lm: nn.Module) -> Transform | None:
    """:func:`matching_transform` on a few tokens; mode and random state are left as they were."""
    head = output_head(lm)
    if head is None:
        return None
    device = next(lm.parameters()).device
    modes = [(module, module.training) for module in lm.modules()]
    tokens = torch.arange(1, PROBED[1] + 1, device=device).expand(PROBED)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    try:
        lm.eval()
        expected = lm(**inputs).logits
        return matching_transform(lm, head(decoder_of(lm)(**inputs)[0]), expected, tolerance=1e-3)
    except (TypeError, AttributeError, IndexError, KeyError):
        # A decoder with another signature or output: the model's own forward still works.
        return None
    finally:
        for module, training in modes:
            module.training = training
