"""The folder an export is written to: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmemtune.errors import UserError
from qmemtune.export.marker import MARKER


def check_destination(path: Path, *, overwrite: bool) -> None:
    """See before any work whether ``path`` may be written.

    Raises:
        UserError: something is there that may not be replaced. With ``overwrite`` only an earlier export is replaced:
            a mistyped path must not cost somebody a folder of something else.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError("the destination exists and is not a folder", where=str(path), fix="choose another export.path")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(
            "the destination exists", where=str(path), fix="add export.overwrite=true, or choose another export.path"
        )
    if not (path / MARKER).is_file():
        raise UserError(
            f"the destination is not an earlier export (it holds no {MARKER}), so it is not replaced",
            where=str(path),
            fix="choose another export.path, or remove that folder yourself",
        )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place when the context ends well, and vanishes otherwise.

    Raises:
        UserError: nothing can be written there.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write there: {error.strerror}", where=str(path), fix="choose another export.path"
        ) from error
    try:
        yield partial
        _readable(partial)
        _replace(path, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _readable(folder: Path) -> None:
    """Give files the usual permissions: weights are written for their owner only, but are there to be served."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _replace(path: Path, partial: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
