"""Greedy answers to many prompts: batches of like length, padded on the left, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qmemtune.data.chat import turn_end
from qmemtune.data.encode import decoded
from qmemtune.evaluation.forward import Autocast, Instructions, evaluation_forward, model_device
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.head import keep_head_input_contiguous

TOKENS_PER_ROW = 512
"""A generation batch may hold this many tokens for each row of the evaluation batch size: short rows go in larger
batches, since a decoding step costs nearly the same for one row as for many."""
MAX_BATCH = 128


class Answer(NamedTuple):
    """What a model said to a prompt."""

    text: str
    cut: bool
    """Whether it was the limit that ended it, not the model."""


def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int,
    source: Instructions | None = None,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The answer of each row, in the order of ``rows``: what follows its prompt, up to an end token.

    Args:
        rows: dicts with ``prompt_ids`` (list of int) and optionally ``instruction``.
        max_new_tokens: longest answer.
        batch_size: as in the loss; more rows are taken where they are short (:data:`TOKENS_PER_ROW`).
        progress: called after each batch with the number of rows done.
    """
    prompts = [list(row["prompt_ids"]) or [start_token(tokenizer)] for row in rows]
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, use_cache=True
    )
    answers = [Answer("", cut=False)] * len(rows)
    done = 0
    with own_generation_config(model, config), dequantized_on_cpu(model), contiguous_head_input(model):
        for indices in generation_batches([len(p) for p in prompts], max_new_tokens, batch_size):
            instructions = [str(rows[i].get("instruction") or "") for i in indices]
            ids, mask = pad_left([prompts[i] for i in indices], pad)
            device = model_device(model)
            with evaluation_forward(instructions, source, autocast):
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
            for i, new in zip(indices, output[:, ids.shape[1] :].tolist(), strict=True):
                own = until_end(new, ends)
                answers[i] = Answer(decoded(tokenizer, own), cut=len(own) == max_new_tokens)
            done += len(indices)
            if progress is not None:
                progress(done)
    return answers


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens before the first end token."""
    for position, token in enumerate(ids):
        if token in ends:
            return list(ids[:position])
    return list(ids)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, all of the model's, and the one that ends a turn of a chat."""
    found: list[int] = []
    for owner in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(owner, "eos_token_id", None)
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if token is not None and token not in found:
                found.append(int(token))
    end = turn_end(tokenizer)
    if end is not None and end not in found:
        found.append(end)
    return found or [int(tokenizer.pad_token_id or 0)]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What an empty prompt is replaced by: a model needs one token to go on from."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return int(begin if begin is not None else 0)


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T); prompts end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generation_batches(lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of like prompt length, longest first, within a budget of tokens."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        row_tokens = lengths[order[start]] + max_new_tokens
        size = min(max(batch_size, batch_size * TOKENS_PER_ROW // row_tokens), max(batch_size, MAX_BATCH))
        yield order[start : start + size]
        start += size


@contextmanager
def contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """While open, as :func:`~qmemtune.models.head.keep_head_input_contiguous`."""
    handles = keep_head_input_contiguous(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def own_generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """While open, ``config`` is the model's only source of generation settings.

    ``generate`` fills what a given config leaves unset (repetition penalty, temperature, ...) from the model's
    own, which many published models ship with.
    """
    owners = [m for m in model.modules() if "generation_config" in m.__dict__]
    before = [owner.__dict__["generation_config"] for owner in owners]
    for owner in owners:
        owner.__dict__["generation_config"] = config
    try:
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.__dict__["generation_config"] = value
