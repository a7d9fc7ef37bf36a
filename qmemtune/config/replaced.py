"""A source given on the command line replaces the whole source: what files said about the old one goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmemtune.config.settings import Setting
from qmemtune.config.splits import SPLITS, is_here, names_split
from qmemtune.config.values import from_text

SPLIT_KEYS = ("data.split", "data.eval_split")


def resets(layers: list[Setting], overrides: list[Setting]) -> list[Setting]:
    """Resets of keys that files set for a source which an override replaces.

    A ``data.path`` on this machine has no hub configuration, and no splits unless it is a folder that holds some; a
    ``model.path`` has not the revision of another one. Keys that overrides set themselves stay.
    """
    given = {setting.key for setting in overrides}
    set_by_files = {setting.key: setting.value for setting in layers}
    found: list[Setting] = []
    for setting in overrides:
        keys: tuple[str, ...] = ()
        if setting.key == "model.path" and not setting.reset:
            keys = ("model.revision",)
        elif setting.key == "data.path" and not setting.reset:
            keys = _of_another_source(from_text(str(setting.value), str), set_by_files.get("data.eval_split"))
        found += [Setting(key, None, setting.source, reset=True) for key in keys if key in set_by_files.keys() - given]
    return found


def _of_another_source(path: str, eval_split: Any) -> tuple[str, ...]:
    """Keys that, set for another source, mean nothing for the rows at a data path."""
    if not is_here(path):
        return ()
    try:
        folder = Path(path).expanduser()
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except (OSError, ValueError, RuntimeError):
        names = []
    heldout = [*SPLITS["test"], *SPLITS["validation"], *([eval_split] if isinstance(eval_split, str) else [])]
    return ("data.name",) if any(names_split(name, *heldout) for name in names) else ("data.name", *SPLIT_KEYS)
