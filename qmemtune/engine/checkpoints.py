"""Checkpoints that are complete or absent: written beside, on the disk, checked by a manifest, renamed last.

A checkpoint is Trainer's (adapter, optimizer, scheduler, random states, trainer state) plus the run's own state.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from qmemtune.disk import onto_disk
from qmemtune.engine.manifest import ANOTHER, MANIFEST, Checkpoint, NotComplete, damage, read_manifest, write_manifest
from qmemtune.errors import Finding, UserError

WRITING = ".writing"
"""Folder, beside the checkpoints, in which the next one is being written."""
DELETING = ".deleting-"
"""Start of the name of a checkpoint that is being deleted."""
ASIDE = "damaged-"
"""Start of the name of a damaged checkpoint that a run has gone on before."""
LOADED = (".bin", ".distcp", ".json", ".pt", ".pth", ".safetensors")
"""Endings of the files that loading a checkpoint looks for."""
NAME = re.compile(r"checkpoint-(\d+)")
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
OWN = ("totals.json", "best.json")
"""The run's own state."""


def found_checkpoints(root: Path) -> list[Path]:
    """Folders in ``root`` that are named like checkpoints, by step; complete or not."""
    found = [path for path in root.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """The complete checkpoints in ``root``, by step; every file is read.

    Raises:
        UserError: a newer version of this program wrote one of them.
    """
    return list(reversed([checkpoint for checkpoint in _newest_first(root, []) if checkpoint is not None]))


def newest_complete(root: Path) -> tuple[Checkpoint | None, list[Finding]]:
    """The newest complete checkpoint in ``root``, and what is wrong with the newer ones.

    Raises:
        UserError: a newer version of this program wrote one of them.
    """
    passed: list[Finding] = []
    newest = next((checkpoint for checkpoint in _newest_first(root, passed) if checkpoint is not None), None)
    return newest, passed


def _newest_first(root: Path, damaged: list[Finding]) -> Iterator[Checkpoint | None]:
    for path in reversed(found_checkpoints(root)):
        try:
            yield checked(path)
        except NotComplete as error:
            damaged.extend(error.findings)
            yield None


def checked(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, after reading all of it.

    Raises:
        NotComplete: something of it is missing or not as it was written.
        UserError: a newer version of this program wrote it.
    """
    checkpoint = read_manifest(path)
    refuse_links(path)
    bad = [words for name in sorted(checkpoint.files) if (words := damage(path, name, checkpoint.files[name]))]
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != checkpoint.step:
        bad.append(f"its files are of step {checkpoint.step}")
    if checkpoint.format > 1:
        # A stray model.safetensors would be loaded in place of the adapter; a note of the user's harms nothing.
        files = (file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        present = {str(file.relative_to(path)) for file in files if file.suffix in LOADED}
        bad += [f"{name} was not written with it" for name in sorted(present - {*checkpoint.files, MANIFEST})]
    if bad:
        raise NotComplete(f"checkpoint is damaged: {'; '.join(bad)}", where=str(path), fix=ANOTHER)
    return checkpoint


def refuse_links(path: Path) -> None:
    """Refuse a checkpoint that is a link, or holds one: what it leads to is no part of the run.

    Raises:
        NotComplete: with the first link.
    """
    link = next((entry for entry in (path, *path.rglob("*")) if entry.is_symlink()), None)
    if link is not None:
        raise NotComplete(
            f"checkpoint holds a link: {link.name} leads to {os.readlink(link)}", where=str(path), fix=ANOTHER
        )


def require_files(checkpoint: Checkpoint, *, sharded: bool) -> None:
    """Make sure that a checkpoint holds everything without which training would go on differently.

    Args:
        checkpoint: what to check.
        sharded: FSDP or DeepSpeed write their own files in place of Trainer's.

    Raises:
        UserError: with what is missing.
    """
    ranks = range(checkpoint.world_size)
    states = ["rng_state.pth"] if checkpoint.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    needed = [*OWN, *([] if sharded else NEEDED), *states]
    missing = [name for name in needed if name not in checkpoint.files]
    if missing:
        raise UserError(
            f"checkpoint is damaged: {', '.join(missing)} is missing", where=str(checkpoint.path), fix=ANOTHER
        )


def begin(root: Path) -> Path:
    """An empty folder to write the next checkpoint into."""
    writing = root / WRITING
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    return writing


def complete(written: Path, root: Path, facts: dict[str, Any]) -> Path:
    """Turn a written folder into a checkpoint: on the disk as a whole before it has its name.

    Args:
        written: the folder, named ``checkpoint-<step>``, below :data:`WRITING`.
        root: the run's checkpoints.
        facts: see :class:`Checkpoint`, and ``qmemtune``, the version that writes it.

    Returns:
        Its final path.
    """
    # Trainer pickles its arguments; nothing reads them back, and a pickle is nothing to keep in a run folder.
    (written / "training_args.bin").unlink(missing_ok=True)
    for file in [file for file in written.rglob("*") if file.is_file()]:
        onto_disk(file)
    onto_disk(write_manifest(written, facts))
    for folder in [*(path for path in written.rglob("*") if path.is_dir()), written]:
        onto_disk(folder)
    final = root / written.name
    if final.exists():
        discard(final)
    written.rename(final)
    onto_disk(root)
    shutil.rmtree(root / WRITING, ignore_errors=True)
    return final


def rotate(root: Path, limit: int | None, *, newest: Path) -> None:
    """Delete complete checkpoints over ``limit``, oldest first.

    Only complete ones are counted, and damaged ones are left alone: what is deleted always has as many newer complete
    ones as the limit says.

    Args:
        root: the run's checkpoints.
        limit: so many are kept; None keeps all.
        newest: the one that was just written, which need not be read again.
    """
    if limit is None:
        return
    kept = 1
    for path in reversed([path for path in found_checkpoints(root) if path != newest]):
        try:
            checkpoint = checked(path) if kept < max(limit, 1) else read_manifest(path)
        except NotComplete:
            continue
        kept += 1
        if kept > max(limit, 1):
            discard(checkpoint.path)


def remove_later(root: Path, step: int) -> list[Path]:
    """Clear away checkpoints after ``step``, and remains: a run goes on from there.

    Complete ones are deleted. Damaged ones get another name: what is whole in them may be wanted yet.

    Returns:
        The new paths of damaged ones.
    """
    aside = []
    for path in found_checkpoints(root):
        if int(path.name.partition("-")[2]) > step:
            try:
                checked(path)
            except UserError:
                aside.append(set_aside(path))
            else:
                discard(path)
    for path in [root / WRITING, *root.glob(f"{DELETING}*")]:
        shutil.rmtree(path, ignore_errors=True)
    return aside


def set_aside(path: Path) -> Path:
    """Give a checkpoint a name that is none of a checkpoint, and that nothing else has."""
    aside, numbers = path.with_name(ASIDE + path.name), count(2)
    while os.path.lexists(aside):
        aside = path.with_name(f"{ASIDE}{path.name}-{next(numbers)}")
    return path.rename(aside)


def discard(path: Path) -> None:
    """Delete a checkpoint; cut off in the middle, nothing is left that looks like one."""
    leaving = path.with_name(DELETING + path.name)
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    if leaving.is_symlink():
        # Only the link goes, not what it leads to.
        leaving.unlink()
    else:
        shutil.rmtree(leaving)
