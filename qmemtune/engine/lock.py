"""One process trains into a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from qmemtune.errors import UserError
from qmemtune.rundir import RunDir


@contextmanager
def in_use(run: RunDir) -> Iterator[None]:
    """Keep a run folder for this process while the block runs. The system lets go of it when the process is gone.

    Raises:
        UserError: another process has it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            "another process trains into this folder",
            where=str(run.path),
            fix="wait for its end, or choose another run_dir",
        ) from None
    except NotImplementedError:
        # A file system without locks: nothing can be known there.
        pass
    try:
        yield
    finally:
        lock.release()


def refuse_if_in_use(run: RunDir) -> None:
    """Raise UserError if another process has the folder now; makes nothing."""
    if run.lock.is_file():
        with in_use(run):
            pass
