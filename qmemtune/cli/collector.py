"""Python's cycle collector, kept out of the way while a verb's libraries are imported.

Importing torch, transformers and PEFT makes a million objects that stay to the end. The collector walks over them again
and again while they are made, and once more at the exit: a quarter of the processor time of a dry run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_frozen = False


def keep_imported() -> None:
    """Leave all that is there now alone from now on; once a process, since garbage left alone is never freed."""
    global _frozen
    if not _frozen:
        _frozen = True
        gc.collect()
        gc.freeze()


@contextmanager
def collector_paused() -> Iterator[Callable[[], None]]:
    """No collection inside, until the function that it gives is called: what is imported by then is kept.

    A collector that is off already stays off.
    """
    paused = gc.isenabled()
    gc.disable()

    def imported() -> None:
        nonlocal paused
        if paused:
            paused = False
            keep_imported()
            gc.enable()

    try:
        yield imported
    finally:
        if paused:
            gc.enable()
