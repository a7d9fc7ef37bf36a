"""Notices data files that change while a run trains on their rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from qmemtune.config.data import DataConfig
from qmemtune.config.missing import MISSING
from qmemtune.data.mixture import heldout_source, source_configs
from qmemtune.data.sources import GENERATED, local_files
from qmemtune.errors import UserError

EVERY_S = 30.0
"""Seconds between two looks at the files."""
State = tuple[int, int, int] | None
"""Size, time of the last change and number of a file; None where it is gone."""


class WatchedFiles:
    """The local files of a data config, as they are when this is made.

    Args:
        config: the data options; None watches nothing.
    """

    def __init__(self, config: DataConfig | None) -> None:
        found = [] if config is None else all_files(config)
        self.states: dict[Path, State] = {path: state_of(path) for path in found}
        self._looked = time.monotonic()

    def changed(self, *, now: bool = False) -> list[Path]:
        """Files that changed or went since they were looked at last; each change is told once.

        Args:
            now: look even if the last look was just before.
        """
        if not now and time.monotonic() - self._looked < EVERY_S:
            return []
        self._looked = time.monotonic()
        fresh = {path: state_of(path) for path in self.states}
        found = [path for path, state in fresh.items() if state != self.states[path]]
        self.states = fresh
        return found


def all_files(config: DataConfig) -> list[Path]:
    """Every local file that rows come from; those that cannot be found are left to who reads them."""
    found: dict[Path, None] = {}
    for path, split in places(config):
        try:
            files = local_files(path, split)
            if files is None and Path(path).expanduser().is_dir():
                files = sorted(file for file in Path(path).expanduser().rglob("*") if file.is_file())
        except (OSError, UserError):
            continue
        found.update(dict.fromkeys(files or []))
    return list(found)


def places(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Paths of all sources that are not made by code, with their splits."""
    heldout = heldout_source(config)
    every = [*source_configs(config).values(), *([] if heldout is None else [heldout])]
    given = [(own.path, own.split) for own in every]
    return ((path, split) for path, split in given if path != MISSING and not path.startswith(GENERATED))


def state_of(path: Path) -> State:
    """What tells one content of a file from another without reading it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
