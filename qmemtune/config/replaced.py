"""A source given on the command line replaces the whole source: what files said about the old one goes with it."""

from __future__ import annotations

from pathlib import Path

from qmemtune.config.paths import looks_local
from qmemtune.config.settings import Setting
from qmemtune.config.values import BadValue, from_text

HUB_ONLY = ("data.name", "data.split", "data.eval_split")


def resets(layers: list[Setting], overrides: list[Setting]) -> list[Setting]:
    """Resets of keys that files set for a source which an override replaces.

    A ``data.path`` on this machine has no hub configuration and no splits; a ``model.path`` has not the revision of
    another one. Keys that overrides set themselves stay.
    """
    given = {setting.key for setting in overrides}
    set_by_files = {setting.key for setting in layers}
    found: list[Setting] = []
    for setting in overrides:
        keys: tuple[str, ...] = ()
        if setting.key == "model.path" and not setting.reset:
            keys = ("model.revision",)
        elif setting.key == "data.path" and not setting.reset and _is_here(str(setting.value)):
            keys = HUB_ONLY
        found += [Setting(key, None, setting.source, reset=True) for key in keys if key in set_by_files - given]
    return found


def _is_here(text: str) -> bool:
    try:
        path = from_text(text, str)
        return path.startswith("generated:") or looks_local(path) or Path(path).exists()
    except (BadValue, OSError, ValueError):
        return False
