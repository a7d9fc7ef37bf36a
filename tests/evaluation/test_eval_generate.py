"""Streamed answers: the same text in pieces, whole characters only, nothing left open."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qmemtune.config.schema import Config
from qmemtune.data.render import render_prompt
from qmemtune.evaluation.decode import greedy_answers
from qmemtune.evaluation.generate import default_instruction, stream_answer, stream_ids


class Scripted(nn.Module):
    """A language model that always goes on with the next token of a given answer."""

    def __init__(self, prompt, answer, vocabulary, cached):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script, self.vocabulary, self.cached = [*prompt, *answer], vocabulary, cached
        self.lengths = []

    def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=True):
        self.lengths.append(input_ids.shape[1])
        position = attention_mask.shape[1]
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        logits[0, -1, self.script[position]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=position if self.cached else None)


@pytest.mark.parametrize("cached", [True, False])
def test_pieces_are_whole_characters(tokenizer, cached):
    answer = "naïve 日本語 🦊🎉 fin"
    prompt, ids = tokenizer("say").input_ids, tokenizer(answer).input_ids
    model = Scripted(prompt, [*ids, tokenizer.eos_token_id], len(tokenizer), cached)
    pieces = list(stream_ids(model, tokenizer, prompt, autocast=nullcontext, max_new_tokens=200))
    assert "".join(pieces) == answer
    assert len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)
    assert model.lengths[1] == (1 if cached else len(prompt) + 1)


def test_a_character_cut_off_by_the_limit_is_told_at_the_end(tokenizer):
    prompt, ids = tokenizer("say").input_ids, tokenizer("a🦊").input_ids
    model = Scripted(prompt, ids, len(tokenizer), cached=True)
    pieces = list(stream_ids(model, tokenizer, prompt, autocast=nullcontext, max_new_tokens=len(ids) - 1))
    assert "".join(pieces) == tokenizer.decode(ids[:-1])


def loaded(model, tokenizer, **data):
    config = Config()
    config.data.format = "prompt_completion"
    for name, value in data.items():
        setattr(config.data, name, value)
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        config=config,
        device=torch.device("cpu"),
        dtype=torch.float32,
        source=Recorder(),
    )


class Recorder:
    def __init__(self):
        self.seen, self.open = set(), 0

    @contextmanager
    def context(self, instructions):
        self.seen.update(instructions)
        self.open += 1
        yield
        self.open -= 1


def test_streamed_text_is_the_batched_text(model, tokenizer):
    run = loaded(model, tokenizer)
    ids = render_prompt(run.config.data, tokenizer, "reverse the words: red fox")
    (whole,) = greedy_answers(model, tokenizer, [{"prompt_ids": ids}], max_new_tokens=20, batch_size=1)
    assert "".join(stream_answer(run, "reverse the words: red fox", max_new_tokens=20)) == whole.text


def test_a_conversation_is_rendered_as_a_chat(llama, tokenizer):
    run = loaded(llama, tokenizer, format="messages")
    messages = [{"role": "user", "content": "sort: 3 1"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    expected = "".join(stream_ids(llama, tokenizer, ids, autocast=nullcontext, max_new_tokens=8))
    assert "".join(stream_answer(run, messages, max_new_tokens=8)) == expected


def test_the_instruction_is_open_in_forwards_only(llama, tokenizer):
    run = loaded(llama, tokenizer)
    inside = []
    llama.model.register_forward_hook(lambda *_: inside.append(run.source.open))
    for _ in stream_answer(run, "sort: 3 1", max_new_tokens=4):
        assert run.source.open == 0
        assert torch.is_grad_enabled()
    assert set(inside) == {1}
    assert run.source.seen == {"sort: 3 1"}
    list(stream_answer(run, "sort: 3 1", instruction="sort", max_new_tokens=1))
    assert "sort" in run.source.seen


def test_drawing_is_repeatable_and_leaves_the_random_state(llama, tokenizer):
    run = loaded(llama, tokenizer)
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def draw(seed):
        return "".join(stream_answer(run, "sort: 3 1", max_new_tokens=20, temperature=1.5, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    draw(None)
    assert torch.equal(torch.get_rng_state(), state)


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "user", "content": "two"},
]


@pytest.mark.parametrize(
    ("kind", "prompt", "expected"),
    [
        ("user", "hello", "hello"),
        ("user", TALK, "one"),
        ("system", TALK, "be brief"),
        ("system", "hello", "set"),
        ("column", TALK, ""),
        ("none", "hello", ""),
    ],
)
def test_default_instruction(kind, prompt, expected):
    assert default_instruction(kind, "set", prompt) == expected
