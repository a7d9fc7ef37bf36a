"""Stopping a run from outside: SIGINT and SIGTERM end it after the current step, a second one at once.

A terminal, `timeout` or a scheduler signals all processes of a run. What follows is up to the main process: those that
load its rows go on until it ends them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import register_after_fork
from types import FrameType

from qmemtune.errors import RunFailed

ECHO_S = 0.5
"""The same signal again so soon is the same request: `timeout` signals the process and then its group, and a launcher
passes on what the whole group has got."""


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
        self.received_at = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first one is a request, the second leaves at once."""
        now = time.monotonic()
        if self.signum is None:
            self.signum, self.received_at = signum, now
        elif signum != self.signum or now - self.received_at > ECHO_S:
            # Python's own clean-up may wait for worker processes or a hung kernel: leave without it.
            os._exit(128 + signum)


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM while the block runs; earlier handlers come back afterwards.

    Processes that multiprocessing forks meanwhile (torch's, which load rows) leave both signals to this one.

    Python runs signal handlers in the main thread only: elsewhere nothing is installed and the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    earlier = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    register_after_fork(request, leave_signals_to_main)
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def leave_signals_to_main(request: StopRequest) -> None:
    """In a forked process: let the main process alone end it by a signal.

    torch would have any SIGTERM end it, and the main process then fails in the middle of a step. Its handler, which it
    installs later, is not reached: the signal stays blocked.

    Args:
        request: what the main process listens with.
    """
    if not hasattr(signal, "sigwaitinfo") or signal.getsignal(signal.SIGTERM) != request.receive:
        # macOS has no way to wait for it; or the main process listens no more.
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=leave_when_main_says, daemon=True).start()


def leave_when_main_says() -> None:
    """Wait for a SIGTERM of the main process; torch sees to it that a main process that has died is noticed."""
    main = multiprocessing.parent_process()
    while main is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
