"""Answers of the live model, streamed as they are decoded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qmemtune.adapters.queryable import FixedWeights
from qmemtune.config.schema import Config
from qmemtune.data.encode import decoded
from qmemtune.data.mixture import first_source
from qmemtune.data.render import render_prompt, render_row
from qmemtune.evaluation.decode import end_tokens, start_token
from qmemtune.evaluation.forward import Autocast, Instructions, evaluation_forward, model_device
from qmemtune.models.bitsandbytes import keep_4bit_trainable
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast

Prompt = str | Sequence[dict[str, Any]] | Mapping[str, Any]
"""A prompt's text, a conversation, or the columns of a row."""

UNFINISHED = "\ufffd"
"""What a tokenizer puts where the bytes of a character are not all there."""


class Loaded(Protocol):
    """A loaded run."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def source(self) -> Instructions: ...


def stream_answer(
    loaded: Loaded,
    prompt: Prompt,
    *,
    instruction: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Iterator[str]:
    """The model's answer in pieces of text; joined, they are the whole answer.

    Args:
        loaded: the run, its model in eval mode.
        prompt: a prompt, the messages of a conversation that ends with the user's turn, or a row's columns.
        instruction: text for the instruction prior; if None, what the run took from its rows (``data.instruction``).
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: makes drawing repeatable. The global random state is not touched either way.
    """
    ids, own = prompt_ids(loaded, prompt)
    return stream_ids(
        loaded.model,
        loaded.tokenizer,
        ids,
        instruction=own if instruction is None else instruction,
        source=loaded.source,
        autocast=partial(autocast, loaded.device, loaded.dtype),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def prompt_ids(loaded: Loaded, prompt: Prompt) -> tuple[list[int], str]:
    """The token ids of a prompt as training rows of the run had it, and its text for the instruction prior.

    Raises:
        UserError: it is empty, or lacks what prompts of the run are made of.
    """
    config = first_source(loaded.config.data)
    if isinstance(prompt, Mapping):
        return render_row(config, loaded.tokenizer, prompt)
    ids = render_prompt(config, loaded.tokenizer, prompt)
    return ids, default_instruction(config.instruction, config.system, prompt)


def stream_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    instruction: str = "",
    source: Instructions | None = None,
    autocast: Autocast,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Iterator[str]:
    """The same from token ids. A piece ends where a character ends, never inside its bytes."""
    keep_4bit_trainable(model)
    ends = end_tokens(model, tokenizer)
    generated: list[int] = []
    told = ""
    with dequantized_on_cpu(model):
        for token in decode_tokens(
            model,
            list(prompt_ids) or [start_token(tokenizer)],
            instruction=instruction,
            source=source,
            autocast=autocast,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        ):
            if token in ends:
                break
            generated.append(token)
            text = decoded(tokenizer, generated)
            if not text.endswith(UNFINISHED) and text.startswith(told) and text != told:
                yield text[len(told) :]
                told = text
    rest = decoded(tokenizer, generated)[len(told) :]
    if rest:
        yield rest


def decode_tokens(
    model: nn.Module,
    prompt_ids: list[int],
    *,
    instruction: str,
    source: Instructions | None,
    autocast: Autocast,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
) -> Iterator[int]:
    """Generated token ids, one after the other, without end; the caller stops at an end token.

    A loop of our own and not ``generate`` in a thread: gradient mode and autocast belong to a thread, and the
    caller may stop at any token. The contexts are entered anew for each token, so that nothing is left open while
    the caller has control.
    """
    device = model_device(model)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    extra: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    ids = list(prompt_ids)
    new, cache, weights = ids, None, FixedWeights(model)
    for _ in range(max_new_tokens):
        with evaluation_forward([instruction], source, autocast), weights.held():
            output = model(
                input_ids=torch.tensor([new], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
                past_key_values=cache,
                use_cache=True,
                **extra,
            )
            token = choose(output.logits[0, -1].float().cpu(), temperature, generator)
        yield token
        ids.append(token)
        cache = getattr(output, "past_key_values", None)
        # A model without a KV cache reads the whole text again.
        new = ids if cache is None else [token]


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token id from its logits, (V,)."""
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's own forward, beneath any adapter, has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return argument in inspect.signature(base.forward).parameters


def default_instruction(kind: str, system: str | None, prompt: str | Sequence[dict[str, Any]]) -> str:
    """The instruction text that training rows of this kind would have given; empty where that cannot be known.

    Args:
        kind: ``data.instruction``.
        system: the system prompt put before conversations that have none.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if kind == "user":
        return next((m["content"] for m in messages if m["role"] == "user"), "")
    if kind == "system":
        return next((m["content"] for m in messages if m["role"] == "system"), system or "")
    return ""
