"""The folder an export is written to: all of it, or nothing, whenever the process ends."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from qmemtune.config.export import ExportConfig
from qmemtune.disk import onto_disk
from qmemtune.errors import UserError
from qmemtune.export.marker import MARKER
from qmemtune.rundir import RunDir


def destination(run: RunDir, export: ExportConfig) -> Path:
    """The folder that an export is to be written to, absolute where it is given."""
    if not export.path:
        return run.export / export.format
    # Of "." and ".." too, which have no name of their own.
    return Path(os.path.abspath(Path(export.path).expanduser()))


def check_destination(path: Path, *, force: bool) -> None:
    """See before any work whether ``path`` may be written, and clear away what killed attempts left beside it.

    Raises:
        UserError: something is there that may not be replaced. With ``force`` only an earlier export is replaced:
            a mistyped path must not cost somebody a folder of something else.
    """
    recover(path)
    if not is_taken(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise UserError("the destination exists and is not a folder", where=str(path), fix="choose another export.path")
    if not force:
        raise UserError("the destination exists", where=str(path), fix="add --force, or choose another export.path")
    if not (path / MARKER).is_file():
        raise UserError(
            f"the destination is not an earlier export (it holds no {MARKER}), so it is not replaced",
            where=str(path),
            fix="choose another export.path, or remove that folder yourself",
        )


def is_taken(path: Path) -> bool:
    """Whether something is there that an export would have to replace."""
    return path.is_symlink() or (any(path.iterdir()) if path.is_dir() else path.exists())


def recover(path: Path) -> None:
    """Clean up after attempts whose process is gone: half folders go, and a replaced export that was moved aside
    before the new one took its place comes back."""
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(partial|old)-(\d+)")
    for beside in list(path.parent.iterdir()):
        match = pattern.fullmatch(beside.name)
        if match is None or psutil.pid_exists(int(match[2])):
            continue
        if match[1] == "old" and not path.exists():
            beside.rename(path)
        else:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place when the context ends well, and vanishes otherwise.

    It takes its place by renaming, after all of its files have reached the disk.

    Raises:
        UserError: nothing can be written there.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write there: {error.strerror}", where=str(path), fix="choose another export.path"
        ) from error
    try:
        yield partial
        _readable(partial)
        _on_disk(partial)
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


def _on_disk(folder: Path) -> None:
    """Wait until files and folders have reached the disk."""
    for entry in [*folder.rglob("*"), folder]:
        onto_disk(entry)


def _replace(path: Path, partial: Path) -> None:
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(path)
    onto_disk(path.parent)
