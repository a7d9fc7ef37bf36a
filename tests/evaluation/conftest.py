"""Tiny models and held-out rows."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config

TEXTS = ["reverse the words: red fox", "sort: 7 3 5", "héllo wörld", "What is the capital of France?", "swap a b"]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def llama(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


@pytest.fixture
def gpt2(tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return random_model(config)


@pytest.fixture
def gemma2(tokenizer):
    """A model that soft-caps its logits after the head."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return random_model(config)


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def rows(tokenizer):
    """Rows of different lengths, with two or more labelled stretches in some, and two groups."""
    generator = random.Random(0)
    return [make_row(tokenizer, generator, number) for number in range(13)]


def random_model(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_row(tokenizer, generator, number):
    prompt = " ".join(generator.choices(TEXTS, k=generator.randint(1, 3)))
    answer = " ".join(generator.choices(TEXTS, k=generator.randint(1, 2)))
    prompt_ids = tokenizer(prompt + " ->").input_ids
    answer_ids = [*tokenizer(" " + answer).input_ids, tokenizer.eos_token_id]
    labels = [-100] * len(prompt_ids) + answer_ids
    if number % 3 == 0:
        labels[2:4] = (prompt_ids + answer_ids)[2:4]
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": labels,
        "prompt_ids": prompt_ids,
        "answer": answer,
        "instruction": "",
        "group": "even" if number % 2 == 0 else "odd",
        "origin": f"rows:{number}",
    }
