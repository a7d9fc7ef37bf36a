"""The shared tiny model is what other tests take it for."""

from __future__ import annotations

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_tiny_llama_loads_and_its_tokenizer_spells_any_text(tiny_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    text = "Grüße, 你好 – x = 3 # ~\n\tend"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_chat_template_marks_each_turn_as_one_special_token(tiny_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids.count(tokenizer.eos_token_id) == 1


def test_tests_are_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["QMEMTUNE_CACHE"]
