"""Small real tokenizers, and a writer of data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SENTENCES = [
    "Question: how many apples are in the basket? Answer: there are five apples.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "system user assistant tool",
]


def byte_level_tokenizer(chat_template: str | None = CHATML, *, adds_bos: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
    )


def metaspace_tokenizer() -> Any:
    """A SentencePiece-like tokenizer: every text begins with a space of the tokenizer's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?\n"
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list(letters), show_progress=False
    )
    backend.train_from_iterator([*SENTENCES, letters], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML; begin ``<|endoftext|>`` (not added), end ``<|im_end|>``."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """The same, but it puts ``<|endoftext|>`` before every text, and has no chat template."""
    return byte_level_tokenizer(None, adds_bos=True)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> Any:
    return metaspace_tokenizer()


@pytest.fixture
def chat_tokenizer() -> Callable[[str | None], Any]:
    """Makes a tokenizer with another chat template."""
    return byte_level_tokenizer


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines; returns the path as the option takes it."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def in_loss(tokenizer: Any) -> Callable[[dict[str, Any]], str]:
    """The text of a row's loss tokens; a gap between spans shows as ``|``."""

    def decode(row: dict[str, Any]) -> str:
        spans: list[list[int]] = []
        previous = -100
        for label in row["labels"]:
            if label != -100:
                if previous == -100:
                    spans.append([])
                spans[-1].append(label)
            previous = label
        return "|".join(tokenizer.decode(span) for span in spans)

    return decode
