"""Tokenised rows kept between runs.

An entry's name is a digest of all that the rows follow from: the bytes of every file (or a hub data set's own
fingerprint), the tokenizer with its chat template, every data option, the versions of the libraries and this package's
own code. So nothing stale can be found; what is not used for a month is removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from qmemtune.config.data import DataConfig
from qmemtune.data.mixture import heldout_source, source_configs
from qmemtune.data.prepared import PreparedData
from qmemtune.data.report import DataReport
from qmemtune.data.rows import TokenRows
from qmemtune.data.sources import GENERATED, hub_fingerprint, local_files
from qmemtune.rundir import cache_root

KEPT_S = 30 * 24 * 3600
"""Seconds after its last use at which an entry is removed."""
ENDING = ".arrow"
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")


@dataclass(frozen=True)
class CacheEntry:
    """One file of the cache, there or not."""

    path: Path
    content: bytes
    """Digest of the sources' content, when the entry was named."""

    def load(self) -> PreparedData | None:
        """What was stored; None if there is nothing, or nothing whole."""
        try:
            with pa.memory_map(str(self.path)) as file:
                table = pa.ipc.open_file(file).read_all()
            facts = json.loads(table.schema.metadata[b"qmemtune"])
            report = DataReport.from_state(facts["report"])
            os.utime(self.path)
        except (OSError, pa.lib.ArrowException, TypeError, KeyError, ValueError):
            return None
        report.cached_in = str(self.path)
        rows, count = TokenRows(table), facts["train_rows"]
        return PreparedData(rows[:count], rows[count:], report, facts["format"])

    def store(self, data: PreparedData) -> None:
        """Write the entry; a reader finds all of it or nothing. A folder that cannot be written is no error."""
        facts = {"train_rows": len(data.train), "format": data.format, "report": data.report.state()}
        table = pa.concat_tables([data.train.compact(), data.heldout.compact()]).combine_chunks()
        table = table.replace_schema_metadata({"qmemtune": json.dumps(facts)})
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
                os.replace(name, self.path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)
            remove_unused(self.path.parent)


def remove_unused(folder: Path) -> None:
    """Remove what has not been used for :data:`KEPT_S`, and what a stopped process left."""
    for file in folder.iterdir():
        with suppress(OSError):
            if file.suffix in (ENDING, ".tmp") and time.time() - file.stat().st_mtime > KEPT_S:
                file.unlink()


def cache_entry(config: DataConfig, tokenizer: Any) -> CacheEntry | None:
    """Where the rows of these options are kept; None if they are not to be kept, or cannot be named by content.

    Raises:
        UserError: a source is not there.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not config.cache or config.streaming or backend is None or not hasattr(backend, "to_str"):
        return None
    try:
        found = content(config)
    except OSError:
        return None
    digest = hashlib.blake2b(digest_size=20)
    for part in [*tokenizer_parts(tokenizer), *code_parts(), *option_parts(config), found]:
        digest.update(part)
        digest.update(b"\0")
    return CacheEntry(cache_root() / "rows" / f"{digest.hexdigest()}{ENDING}", found)


def content(config: DataConfig) -> bytes:
    """Digest of the content of every source, each after its name: rows are named after their files."""
    digest = hashlib.blake2b(digest_size=32)
    for part in content_parts(config):
        digest.update(part)
        digest.update(b"\0")
    return digest.digest()


def tokenizer_parts(tokenizer: Any) -> Iterator[bytes]:
    """All of a tokenizer that decides how text becomes tokens."""
    yield type(tokenizer).__name__.encode()
    yield tokenizer.backend_tokenizer.to_str().encode()
    yield json.dumps([tokenizer.special_tokens_map, tokenizer.chat_template], default=str, sort_keys=True).encode()
    yield repr([getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "init_kwargs")]).encode()


@cache
def code_parts() -> tuple[bytes, ...]:
    """The versions of libraries, and the digest of the code that makes rows."""
    digest = hashlib.blake2b()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return (*(f"{name} {version(name)}".encode() for name in LIBRARIES), digest.digest())


def option_parts(config: DataConfig) -> Iterator[bytes]:
    yield json.dumps(dataclasses.asdict(config), sort_keys=True).encode()


def content_parts(config: DataConfig) -> Iterator[bytes]:
    for own in source_configs(config).values():
        yield from source_parts(own.path, own.name, own.split)
    heldout = heldout_source(config)
    if heldout is not None:
        yield from source_parts(heldout.path, heldout.name, heldout.split)


def source_parts(path: str, name: str | None, split: str) -> Iterator[bytes]:
    if path.startswith(GENERATED):
        # Made by code, which is part of the name.
        yield path.encode()
        return
    files = local_files(path, split)
    folder = Path(path).expanduser()
    if files is None and folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
    if files is None:
        yield hub_fingerprint(path, name, split).encode()
        return
    for file in files:
        yield str(file).encode("utf-8", "surrogateescape")
        with file.open("rb") as stream:
            yield hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).digest()
