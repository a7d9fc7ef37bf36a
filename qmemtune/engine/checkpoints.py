"""Checkpoints that are whole or not there: written under another name, listed in a manifest, then renamed.

A checkpoint is Trainer's (adapter, optimizer, scheduler, random states, trainer state) plus the run's own state. The
manifest is written last and names every file with its size, so that a cut-off copy is noticed before it is used.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmemtune.errors import UserError
from qmemtune.rundir import read_json, write_json

MANIFEST = "manifest.json"
WRITING = ".writing"
"""Folder, beside the checkpoints, in which the next one is being written."""
NAME = re.compile(r"checkpoint-(\d+)")
NEEDED = ("adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "totals.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    world_size: int
    """Processes of the run that wrote it."""
    rows_per_step: int
    """Training rows in one optimizer step of that run."""


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """The checkpoints in ``root`` that have a manifest, by step; unfinished ones are passed over."""
    found = []
    for path in root.glob("checkpoint-*"):
        if NAME.fullmatch(path.name) and (path / MANIFEST).is_file():
            found.append(read_manifest(path))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def read_manifest(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, by its manifest; the files themselves are not looked at.

    Raises:
        UserError: there is no readable manifest.
    """
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"not a complete checkpoint: it has no {MANIFEST}",
            where=str(path),
            fix="name a folder checkpoint-<step> of a run, or use resume=auto for the newest complete one",
        )
    facts = read_json(path / MANIFEST)
    return Checkpoint(path, facts["step"], facts["world_size"], facts["rows_per_step"])


def check_files(checkpoint: Checkpoint, *, needed: tuple[str, ...] = NEEDED) -> None:
    """Make sure that every file of a checkpoint is there in full.

    Args:
        checkpoint: what to check.
        needed: files without which training cannot go on as if it had never stopped, listed or not.

    Raises:
        UserError: files are missing or have another size than when they were written.
    """
    listed: dict[str, int] = read_json(checkpoint.path / MANIFEST)["files"]
    bad = [name for name, size in listed.items() if not is_whole(checkpoint.path / name, size)]
    bad += [name for name in needed if name not in listed]
    if not any(name.startswith("rng_state") for name in listed):
        bad.append("rng_state.pth")
    if bad:
        raise UserError(
            f"checkpoint is damaged: {', '.join(bad)} missing or cut off",
            where=str(checkpoint.path),
            fix="delete this checkpoint folder and use resume=auto to go on from the one before it",
        )


def is_whole(file: Path, size: int) -> bool:
    """Whether a file exists with the size that its manifest gives."""
    return file.is_file() and file.stat().st_size == size


def begin(root: Path) -> Path:
    """An empty folder to write the next checkpoint into."""
    writing = root / WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    return writing


def complete(written: Path, root: Path, facts: dict[str, Any]) -> Path:
    """Turn a written folder into a checkpoint.

    Args:
        written: the folder, named ``checkpoint-<step>``, below :data:`WRITING`.
        root: the run's checkpoints.
        facts: ``step``, ``world_size``, ``rows_per_step``.

    Returns:
        Its final path.
    """
    # Trainer pickles its arguments; nothing reads them back, and a pickle is nothing to keep in a run folder.
    (written / "training_args.bin").unlink(missing_ok=True)
    files = {str(f.relative_to(written)): f.stat().st_size for f in sorted(written.rglob("*")) if f.is_file()}
    write_json(written / MANIFEST, {**facts, "files": files})
    final = root / written.name
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    shutil.rmtree(root / WRITING, ignore_errors=True)
    return final


def rotate(root: Path, limit: int | None) -> None:
    """Delete the oldest complete checkpoints over ``limit``. The newest always stays."""
    if limit is None:
        return
    for checkpoint in complete_checkpoints(root)[: -max(limit, 1)]:
        # The manifest goes first: a deletion that is cut off must not leave something that looks complete.
        (checkpoint.path / MANIFEST).unlink()
        shutil.rmtree(checkpoint.path)


def remove_later(root: Path, step: int) -> None:
    """Delete what is not a complete checkpoint up to ``step``: remains of a run that goes on from there."""
    for path in [*root.glob("checkpoint-*"), root / WRITING]:
        name = NAME.fullmatch(path.name)
        if path.is_dir() and (name is None or int(name[1]) > step or not (path / MANIFEST).is_file()):
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
