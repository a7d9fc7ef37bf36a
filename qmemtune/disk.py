"""Waiting for the disk: what is renamed into place must be there before its name is."""

from __future__ import annotations

import os
from pathlib import Path


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
