"""Checkpoints that are complete or absent: written beside, on the disk, checked by a manifest, renamed last.

A checkpoint is Trainer's (adapter, optimizer, scheduler, random states, trainer state) plus the run's own state. Its
manifest is written last; it names every file with size and SHA-256, and itself by a digest of its own, so that whatever
was cut off, changed or lost since is noticed before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmemtune.errors import Finding, UserError
from qmemtune.rundir import CHECKPOINT_FORMAT, refuse_newer

MANIFEST = "manifest.json"
WRITING = ".writing"
"""Folder, beside the checkpoints, in which the next one is being written."""
DELETING = ".deleting-"
"""Start of the name of a checkpoint that is being deleted."""
NAME = re.compile(r"checkpoint-(\d+)")
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
OWN = ("totals.json", "best.json")
"""The run's own state."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by its manifest."""

    path: Path
    step: int
    world_size: int
    """Processes of the run that wrote it."""
    rows_per_step: int
    """Training rows in one optimizer step of that run."""
    files: dict[str, dict[str, Any]]
    """Name → ``size`` in bytes and ``sha256``; the first format knew sizes only."""
    format: int
    log_lines: dict[str, int]
    """Lines that the run's log files had, by name; empty in the first format."""


class NotComplete(UserError):
    """A folder is no complete checkpoint."""


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
        # A stray model.safetensors would be loaded in place of the adapter.
        present = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and not f.name.startswith(".")}
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


ANOTHER = "put a whole copy in its place, or go on from another checkpoint (resume=auto takes the newest complete one)"


def damage(folder: Path, name: str, written: dict[str, Any]) -> str | None:
    """What is wrong with a file, in words; None if it is as it was written.

    Args:
        folder: the checkpoint.
        name: of the file within it.
        written: its ``size`` and ``sha256``.
    """
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != written["size"]:
        return f"{name} has {file.stat().st_size:,} of {written['size']:,} bytes"
    if "sha256" in written and sha256(file) != written["sha256"]:
        return f"{name} has other content than was written (SHA-256)"
    return None


def read_manifest(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, by its manifest; the files themselves are not looked at.

    Raises:
        NotComplete: there is no manifest, or it is damaged.
        UserError: a newer version of this program wrote it.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise NotComplete(
            f"not a complete checkpoint: it has no {MANIFEST}",
            where=str(path),
            fix="name a folder checkpoint-<step> of a run, or use resume=auto for the newest complete one",
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        version = facts.get("format", 1)
        if version != 1 or "digest" in facts:
            if facts.pop("digest", None) != digest(facts):
                raise ValueError("its own digest does not match")
            refuse_newer("checkpoint", version, CHECKPOINT_FORMAT, str(path), facts.get("qmemtune"))
        files = {str(name): {"size": entry} if version == 1 else dict(entry) for name, entry in facts["files"].items()}
        numbers = [facts[name] for name in ("step", "world_size", "rows_per_step")]
        numbers += [entry["size"] for entry in files.values()]
        if not files or any(type(number) is not int for number in numbers):
            raise ValueError("it lists no files with sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotComplete(
            f"checkpoint is damaged: {MANIFEST} cannot be used ({type(error).__name__}: {error})",
            where=str(path),
            fix=ANOTHER,
        ) from None
    step, world_size, rows_per_step = numbers[:3]
    return Checkpoint(path, step, world_size, rows_per_step, files, version, facts.get("log_lines", {}))


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
    files = {}
    for file in sorted(file for file in written.rglob("*") if file.is_file()):
        onto_disk(file)
        files[str(file.relative_to(written))] = {"size": file.stat().st_size, "sha256": sha256(file)}
    manifest = {"format": CHECKPOINT_FORMAT, **facts, "files": files}
    text = json.dumps({**manifest, "digest": digest(manifest)}, indent=2) + "\n"
    (written / MANIFEST).write_text(text, encoding="utf-8")
    onto_disk(written / MANIFEST)
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


def remove_later(root: Path, step: int) -> None:
    """Delete checkpoints after ``step``, and remains: a run goes on from there."""
    for path in found_checkpoints(root):
        if int(path.name.partition("-")[2]) > step:
            discard(path)
    for path in [root / WRITING, *root.glob(f"{DELETING}*")]:
        shutil.rmtree(path, ignore_errors=True)


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


def digest(facts: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its digest."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Of a file's content, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def onto_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        # Windows opens no folders.
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
