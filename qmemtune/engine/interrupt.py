"""Stopping a run from outside: SIGINT and SIGTERM end it after the current step, a second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qmemtune.errors import RunFailed


class Interrupted(RunFailed):
    """A run was stopped by a signal after a whole step; its checkpoint is saved.

    Args:
        problem: at which step it stopped.
        fix: the command that goes on.
        signum: the signal, which decides the exit code (128 + its number, as shells do).
    """

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None, signum: int) -> None:
        super().__init__(problem, where=where, fix=fix)
        self.exit_code = 128 + signum


class StopRequest:
    """Whether a signal asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first one is a request, the second leaves at once."""
        if self.signum is not None:
            # Python's own clean-up may wait for worker processes or a hung kernel: leave without it.
            os._exit(128 + signum)
        self.signum = signum


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM while the block runs; earlier handlers come back afterwards.

    Python runs signal handlers in the main thread only: elsewhere nothing is installed and the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
