"""Digests of a base model, by which a run knows the one that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qmemtune.config.missing import MISSING
from qmemtune.config.model import ModelConfig
from qmemtune.models.configs import read_config
from qmemtune.models.sources import GENERATED, resolve, stored_in
from qmemtune.models.tensor_files import read_header

WHOLE = 1 << 28
"""Bytes of weights up to which all of them are read: a fraction of a second."""
SAMPLES = 16
SAMPLE = 1 << 12
"""Of more weights, so many pieces of so many bytes are read of each tensor, its first and last ones among them."""
NOT_COUNTED = ("_name_or_path", "transformers_version")
"""Entries of a model's config that say who wrote it."""


def base_digests(model: ModelConfig) -> dict[str, str]:
    """What tells a base model from another one of the same name, cheaply enough for every start of a run.

    Of a model on this machine: ``config`` (config.json as values, and the Python code that it names) and ``weights``
    (each tensor's name, type, shape and values). Times, places and the division into files do not count. The values
    are read whole up to 256 MiB; of larger models 16 pieces of 4 KiB of each tensor, spread evenly, are: some 20 MB
    of a model with 7 billion weights. Weights that were trained, converted or copied from another model differ in every
    piece; a few values changed by hand between the pieces are not noticed.

    Of a hub's model: its ``commit``, if that is known. Nothing of a generated one, which its options determine.

    Raises:
        UserError: the model is not there.
    """
    if model.path == MISSING or model.path.startswith(GENERATED):
        return {}
    source = resolve(model.path, model.revision)
    if not source.is_local:
        commit = getattr(read_config(source, model), "_commit_hash", None)
        return {"commit": str(commit)} if commit else {}
    folder = Path(source.location)
    return {"config": config_digest(folder), "weights": weights_digest(folder)}


def config_digest(folder: Path) -> str:
    """SHA-256 of a model's config, and of its own code where the config names some."""
    text = (folder / "config.json").read_bytes()
    content: Any = json.loads(text)
    digest = hashlib.sha256()
    if isinstance(content, dict):
        counted = {key: value for key, value in content.items() if key not in NOT_COUNTED}
        digest.update(json.dumps(counted, sort_keys=True).encode())
        if "auto_map" in content:
            for file in sorted(folder.glob("*.py")):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's tensors in the order of their names; of large models', of samples of them."""
    files = stored_in(folder)
    whole = sum(file.stat().st_size for file in files) <= WHOLE
    tensors = sorted((name, file, entry) for file in files for name, entry in tensors_of(file))
    digest = hashlib.sha256()
    opened: dict[Path, BinaryIO] = {}
    try:
        for name, file, (kind, begin, end) in tensors:
            digest.update(f"{name}\0{kind}\0{end - begin}\0".encode())
            stream = opened.get(file)
            if stream is None:
                # Unbuffered: a buffer would read more than the samples.
                stream = opened[file] = open(file, "rb", buffering=0)  # noqa: SIM115 - closed below
            for start, length in [(begin, end - begin)] if whole else pieces(begin, end):
                stream.seek(start)
                while length > 0 and (read := stream.read(min(length, 1 << 24))):
                    digest.update(read)
                    length -= len(read)
    finally:
        for stream in opened.values():
            stream.close()
    return digest.hexdigest()


def tensors_of(file: Path) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Name, type and shape, first byte and end of each tensor of a file; one that is none counts as a single tensor."""
    try:
        _, entries = read_header(file)
    except ValueError:
        # Loading tells what is wrong with it.
        yield file.name, ("", 0, file.stat().st_size)
        return
    for entry in entries:
        yield entry.name, (f"{entry.dtype}{list(entry.shape)}", entry.begin, entry.end)


def pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """First byte and length of the samples of a tensor; all of it where they would overlap."""
    if end - begin <= SAMPLES * SAMPLE:
        yield begin, end - begin
        return
    for i in range(SAMPLES):
        yield begin + (end - begin - SAMPLE) * i // (SAMPLES - 1), SAMPLE
