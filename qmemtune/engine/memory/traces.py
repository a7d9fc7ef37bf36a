"""Traces of earlier runs, kept beside the other caches: tracing takes two seconds of every start.

A trace is found by all that it follows from: the model's config, the adapter's, the batch, and the code that runs,
which is this package's own files and the versions of those it calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import qmemtune
from qmemtune.engine.environment import PACKAGES, version_of
from qmemtune.engine.memory.tracing import Traced
from qmemtune.rundir import cache_root, write_json

FOLDER = "traces"


def trace_file(key: Mapping[str, Any]) -> Path:
    """Where the trace of ``key`` (values that JSON can hold, or that are told apart by their text) is kept."""
    text = json.dumps({**key, "code": code_digest()}, sort_keys=True, default=sorted_or_text)
    return cache_root() / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def sorted_or_text(value: Any) -> Any:
    """What JSON holds of a set or of any other value."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


@cache
def code_digest() -> str:
    """SHA-256 of this package's source files and of the versions of what they call."""
    root = Path(qmemtune.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    for package in PACKAGES:
        digest.update(f"{package} {version_of(package)}\0".encode())
    return digest.hexdigest()


def read_trace(file: Path) -> Traced | None:
    """The trace a file holds; None where there is none, or a damaged one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        traced = Traced(**{field.name: float(values[field.name]) for field in dataclasses.fields(Traced)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return traced if all(math.isfinite(value) and value >= 0 for value in vars(traced).values()) else None


def write_trace(file: Path, traced: Traced) -> None:
    """Keep a trace; where nothing can be written, the next run traces again."""
    with suppress(OSError):
        write_json(file, dataclasses.asdict(traced))
