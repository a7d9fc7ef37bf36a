"""Paths that a config names: which of them can only be on this machine, and whether they are there."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from qmemtune.config.adapters import QueryableConfig, uses_prior
from qmemtune.config.missing import MISSING
from qmemtune.config.problem import Problem, value_of
from qmemtune.config.schema import Config

DATA_PATHS = ("data.path", "data.eval_path")
"""Keys that say where rows are, those of data.sources aside."""


def paths(c: Config) -> Iterator[Problem]:
    """Paths that are empty or lead to nothing."""
    keys = {key: value_of(c, key) for key in ("model.path", "model.tokenizer", "model.chat_template", *DATA_PATHS)}
    keys |= {f"data.sources.{name}.path": source.path for name, source in c.data.sources.items()}
    for key, path in keys.items():
        if isinstance(path, str) and path != MISSING and looks_local(path, is_file=key == "model.chat_template"):
            yield from _exists(key, path)
        elif path == "":
            yield key, "is empty", None
    if isinstance(c.adapter, QueryableConfig) and c.adapter.prior_encoder != "base" and uses_prior(c.adapter):
        yield from _exists("adapter.prior_encoder", c.adapter.prior_encoder)
    resume = c.resume.path
    if resume is not None and resume != "auto":
        yield from _exists("resume.path", resume)
    if resume == "auto" and c.run_dir is None:
        yield "resume.path", "auto needs to know the run folder", "give run_dir=, or resume=<path of a checkpoint>"


def _exists(key: str, path: str) -> Iterator[Problem]:
    try:
        file = Path(path).expanduser()
        there = file.exists() or (is_glob(path) and any(True for _ in glob.iglob(str(file), recursive=True)))
    except (OSError, ValueError):
        there = False
    if not there:
        yield key, f"{path} does not exist (seen from {Path.cwd()})", f"check the path, or give another with {key}="


def looks_local(path: str, *, is_file: bool = False) -> bool:
    """Whether a path can only mean a file or folder here, not a hub id or a package's file."""
    if path.startswith(("package:", "generated:")):
        return False
    ends = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".gguf", ".jinja")
    return is_file or path.startswith((".", "/", "~")) or path.lower().endswith((*ends, ".safetensors"))


def is_glob(path: str) -> bool:
    """Whether a path is a pattern for several files."""
    return "*" in path or "?" in path
