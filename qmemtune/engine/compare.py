"""Whether two runs did the same: log lines and checkpoints, but for what depends on the clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmemtune.engine.manifest import MANIFEST

TIMES = ("tokens_per_s", "seconds")
"""Endings of the names of entries, in whatever depth, that no two runs share."""
PROSE = ("README.md",)
"""Files of a checkpoint that nothing reads."""


def without_times(value: Any) -> Any:
    """A JSON value without :data:`TIMES`."""
    if isinstance(value, Mapping):
        return {key: without_times(item) for key, item in value.items() if not str(key).endswith(TIMES)}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def logged_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file without times; none where there is no file."""
    if not file.is_file():
        return []
    return [without_times(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line]


def different_files(first: Path, second: Path) -> list[str]:
    """Names of the files that differ between two checkpoints (or adapters), in what they say if not in bytes."""
    names = {str(f.relative_to(folder)) for folder in (first, second) for f in folder.rglob("*") if f.is_file()}
    return sorted(name for name in names - {MANIFEST, *PROSE} if not same_content(first / name, second / name))


def same_content(first: Path, second: Path) -> bool:
    """Whether two files say the same."""
    if not (first.is_file() and second.is_file()):
        return False
    if first.read_bytes() == second.read_bytes():
        return True
    if first.suffix == ".json":
        return bool(without_times(json.loads(first.read_bytes())) == without_times(json.loads(second.read_bytes())))
    if first.suffix == ".pt":
        return equal(torch.load(first, weights_only=True), torch.load(second, weights_only=True))
    return False


def equal(first: Any, second: Any) -> bool:
    """Whether two nested values are the same, tensors bit for bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and bool((first == second).all())
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)
