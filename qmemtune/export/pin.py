"""Pinning the base that an adapter needs: the hub's commit, or a digest of local weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from qmemtune.config.model import ModelConfig
from qmemtune.errors import UserError
from qmemtune.export.basefiles import weights_of
from qmemtune.models.configs import read_config
from qmemtune.models.sources import Source, resolve


def pinned(source: Source, model: ModelConfig) -> Source:
    """The source with the commit that its files are of; a local one as it is."""
    if source.is_local:
        return source
    return replace(source, revision=getattr(read_config(source, model), "_commit_hash", None) or source.revision)


def weights_digest(source: Source) -> str | None:
    """SHA-256 over the files of local weights; None for a hub's, which a commit pins."""
    if not source.is_local:
        return None
    digest = hashlib.sha256()
    folder, names, _ = weights_of(source)
    for name in names:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_base(model: ModelConfig, expected: str | None, folder: Path) -> None:
    """See whether a local base is the one that an exported adapter was trained on.

    Args:
        expected: the digest that the export recorded; None for none.
        folder: the export.

    Raises:
        UserError: its weights are others.
    """
    if expected is None:
        return
    source = resolve(model.path, model.revision)
    if source.is_local and weights_digest(source) != expected:
        raise UserError(
            f"{source.origin} has other weights than the base that this adapter was trained on",
            where=str(folder),
            fix="name the same model with model.path=",
        )
