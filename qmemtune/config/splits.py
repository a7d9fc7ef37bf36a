"""Splits of data sets: the names that they go by, and which paths may have some."""

from __future__ import annotations

import re
from pathlib import Path

from qmemtune.config.paths import looks_local

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
}
"""Splits, and the names that each of them goes by."""


def is_here(path: str) -> bool:
    """Whether a data path means rows on this machine, and not a hub data set."""
    try:
        return path.startswith("generated:") or looks_local(path) or Path(path).exists()
    except (OSError, ValueError):
        return False


def names_split(name: str, *splits: str) -> bool:
    """Whether a file's name says one of these splits, in whole words: gsm8k-test says test, latest does not."""
    words = _words(name)
    return any(_words(split) in words for split in splits)


def begins_like_split(name: str, *splits: str) -> bool:
    """Whether a word of a file's name begins with that of one of these splits: testdata does."""
    return any(f" {split}" in _words(name) for split in splits)


def _words(name: str) -> str:
    """The words of a name, with a blank before and behind each."""
    found = re.split(r"[\W_]+|(?<=\D)(?=\d)", name.lower())
    return f" {' '.join(word for word in found if word)} "
