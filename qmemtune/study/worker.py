"""How a worker process of a study begins. Imports nothing heavy: libraries speak while they are loaded."""

from __future__ import annotations

import os

from qmemtune.quiet import like_parent


def start_worker(silenced: bool) -> None:
    """Set up a worker process, before it loads what runs cells. ``OMP_NUM_THREADS`` has come with the environment.

    Args:
        silenced: whether libraries are in the process that started it.
    """
    like_parent(silenced)
    # A terminal's Ctrl-C goes to the whole group: here it comes once, from the process that started the study.
    os.setsid()
