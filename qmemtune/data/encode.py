"""Text to token ids, piece by piece, so that boundaries are exact and text never becomes a control token.

A row is encoded as a sequence of segments (prompt, completion, turn, what is between turns), each on its own: the
tokens of a prompt do not depend on what follows it, so what ``generate`` is fed is what the model was trained on.
A special token's name inside a row's text ("<|im_end|>") is encoded in two halves and stays text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

PARALLEL = "TOKENIZERS_PARALLELISM"
PARALLEL_FROM = 256
"""Texts from which on several cores tokenise them."""
PRIVATE_USE = [chr(code) for code in range(0xE000, 0xE100)]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row that is encoded on its own."""

    pieces: tuple[str, ...]
    """Its text, cut where a special token's name must not be recognised."""
    loss: bool
    """Whether its tokens are in the loss."""
    eos: bool = False
    """Whether the end-of-sequence token closes it."""


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens, without special ones; nothing is cleaned up, so that an exact answer stays exact."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def special_names(tokenizer: Any) -> set[str]:
    """Names of a tokenizer's special tokens, as they stand in a text."""
    names = {str(token) for token in tokenizer.all_special_tokens}
    names |= {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    return {name for name in names if len(name) > 1}


@contextmanager
def all_cores() -> Iterator[None]:
    """Let the tokenizer's own threads run; elsewhere they stay off, since processes that fork do not go with them."""
    saved = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        if saved is None:
            del os.environ[PARALLEL]
        else:
            os.environ[PARALLEL] = saved


class Encoder:
    """Encodes segments with a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.special_names = names = special_names(tokenizer)
        self._special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None
        self._backend: Any = None
        self._backend = self._plain_backend()
        self.bos_ids = self._leading_special_ids()
        """What the tokenizer puts before a text: usually BOS, or nothing."""
        self._anchor = self._needed_anchor()

    def _raw(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        if not texts:
            return []
        with all_cores() if len(texts) >= PARALLEL_FROM else nullcontext():
            if self._backend is not None:
                self._backend.no_truncation()
                self._backend.no_padding()
                found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
                return [encoding.ids for encoding in found]
            encoded = self.tokenizer(
                list(texts),
                add_special_tokens=add_special_tokens,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _plain_backend(self) -> Any:
        """The tokenizer's own engine, if the tokenizer adds nothing to it; asked directly, it is faster."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "encode_batch_fast"):
            return None
        texts = ["x", " Two  words\n", "\nähnlich 12,345", *sorted(self.special_names)[:8]]
        for dressed in (False, True):
            expected = self._raw(texts, add_special_tokens=dressed)
            backend.no_truncation()
            backend.no_padding()
            if [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=dressed)] != expected:
                return None
        return backend

    def _leading_special_ids(self) -> list[int]:
        bare, dressed = self._raw(["x"])[0], self._raw(["x"], add_special_tokens=True)[0]
        for start in range(len(dressed) - len(bare) + 1):
            if dressed[start : start + len(bare)] == bare:
                return dressed[:start]
        return []

    def _needed_anchor(self) -> str:
        """A text to put before segments inside a row, for tokenizers that begin every text with a space of their own.

        SentencePiece tokenizers of the Llama 2 kind do; behind the anchor a segment is encoded as it is inside a text.
        """
        anchor = "\n"
        alone, after = self._raw(["x", anchor + "x"])
        before = self._raw([anchor])[0]
        return "" if after == before + alone or after[: len(before)] != before else anchor

    def protected(self, text: str) -> tuple[str, ...]:
        """``text`` cut inside every special token's name, so that none is recognised."""
        if self._special is None:
            return (text,)
        pieces, start = [], 0
        # Cut after the first character and look on from there: names may overlap.
        while match := self._special.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces.append(text[start:])
        return tuple(pieces)

    def free_mark(self, texts: Iterable[str]) -> str:
        """A private-use character that occurs in none of the texts."""
        joined = "".join(texts)
        return next((mark for mark in PRIVATE_USE if mark not in joined), "\U0010fffd")

    def ends_with_special(self, text: str) -> bool:
        return any(text.endswith(name) for name in self.special_names)

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Token ids of every segment of every row, without what the tokenizer puts before a text."""
        anchor = self._anchor
        jobs: dict[tuple[str, bool], list[int]] = {}
        for row in rows:
            for key in self._keys(row):
                jobs[key] = []
        keys = list(jobs)
        encoded = self._raw([text if first or not anchor else anchor + text for text, first in keys])
        if anchor:
            before = self._raw([anchor])[0]
            for i, (text, first) in enumerate(keys):
                if not first:
                    # A segment that melts into the anchor (it begins with a line feed) is encoded bare.
                    melted = encoded[i][: len(before)] != before
                    encoded[i] = self._raw([text])[0] if melted else encoded[i][len(before) :]
        for key, ids in zip(keys, encoded, strict=True):
            jobs[key] = ids
        return [self._joined(row, jobs) for row in rows]

    def _keys(self, row: Sequence[Segment]) -> list[tuple[str, bool]]:
        """(text, whether it begins the row) of every piece that is not empty."""
        keys: list[tuple[str, bool]] = []
        for segment in row:
            for piece in segment.pieces:
                if piece:
                    keys.append((piece, not keys or not self._anchor))
        return keys

    def _joined(self, row: Sequence[Segment], jobs: dict[tuple[str, bool], list[int]]) -> list[list[int]]:
        keys = iter(self._keys(row))
        joined = []
        for segment in row:
            ids = [token for piece in segment.pieces if piece for token in jobs[next(keys)]]
            # A completion template may end with the token itself.
            if segment.eos and self.eos_token_id is not None and ids[-1:] != [self.eos_token_id]:
                ids.append(self.eos_token_id)
            joined.append(ids)
        return joined
