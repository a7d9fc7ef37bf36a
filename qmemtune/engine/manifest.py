"""What a checkpoint says about itself.

Its manifest is written last; it names every file with size and SHA-256, and itself by a digest of its own, so that
whatever was cut off, changed or lost since is noticed before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmemtune.errors import UserError
from qmemtune.rundir import CHECKPOINT_FORMAT, refuse_newer

MANIFEST = "manifest.json"
ANOTHER = "put a whole copy in its place, or go on from another checkpoint (resume=auto takes the newest complete one)"
"""What to do about a checkpoint that is not as it was written."""


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
    row_order: int
    """Of :class:`qmemtune.data.sampler.LengthGroupedSampler`."""


class NotComplete(UserError):
    """A folder is no complete checkpoint."""


def write_manifest(folder: Path, facts: dict[str, Any]) -> Path:
    """Write the manifest of a checkpoint whose files are all there.

    Args:
        folder: the checkpoint.
        facts: see :class:`Checkpoint`, and ``qmemtune``, the version that writes it.

    Returns:
        The manifest's path.
    """
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(file for file in folder.rglob("*") if file.is_file())
    }
    manifest = {"format": CHECKPOINT_FORMAT, **facts, "files": files}
    text = json.dumps({**manifest, "digest": digest(manifest)}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return folder / MANIFEST


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
        # Not named before there was a second one.
        facts.setdefault("row_order", 1)
        numbers = [facts[name] for name in ("step", "world_size", "rows_per_step", "row_order")]
        numbers += [entry["size"] for entry in files.values()]
        if not files or any(type(number) is not int for number in numbers):
            raise ValueError("it lists no files with sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotComplete(
            f"checkpoint is damaged: {MANIFEST} cannot be used ({type(error).__name__}: {error})",
            where=str(path),
            fix=ANOTHER,
        ) from None
    step, world_size, rows_per_step, row_order = numbers[:4]
    return Checkpoint(path, step, world_size, rows_per_step, files, version, facts.get("log_lines", {}), row_order)


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


def digest(facts: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its digest."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Of a file's content, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
