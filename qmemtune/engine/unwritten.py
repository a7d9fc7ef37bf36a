"""What a run was asked to write and could not: the run goes on without, and says so at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qmemtune.errors import Finding, RunFailed, write_failure
from qmemtune.rundir import RunDir


class Unwritten:
    """Collects what is missing.

    Args:
        run: the run's folder.
        tell: is told of each thing when it fails first.
    """

    def __init__(self, run: RunDir, tell: Callable[[str], None]) -> None:
        self.run = run
        self.tell = tell
        self.reasons: dict[str, str] = {}
        """What is missing, and why."""
        self.lines: dict[str, int] = {}
        """Lines that are missing in each file of lines."""

    @contextmanager
    def instead(self, what: str) -> Iterator[None]:
        """Keep in mind that ``what`` is missing where the disk takes no more; any other error passes."""
        try:
            yield
        except Exception as error:
            reason = write_failure(error)
            if reason is None:
                raise
            self.add(what, reason)

    def line(self, file: Path, error: OSError) -> None:
        """One line of ``file`` is missing."""
        self.lines[file.name] = self.lines.get(file.name, 0) + 1
        self.add(file.name, error.strerror or str(error))

    def add(self, what: str, reason: str) -> None:
        """Something is missing."""
        if what not in self.reasons:
            self.reasons[what] = reason
            self.tell(f"warning: {what} could not be written: {reason}; the run goes on")

    def missing(self) -> list[str]:
        """All that is missing, one text each."""
        counts = {name: f" (lines: {count})" for name, count in self.lines.items()}
        return [f"{what}{counts.get(what, '')}: {reason}" for what, reason in self.reasons.items()]

    def report(self) -> None:
        """Raise RunFailed if anything is missing."""
        if self.reasons:
            fix = "free some space; `resume=auto` with this run_dir writes what the newest checkpoint can give"
            raise RunFailed.many(
                [Finding(f"could not be written: {what}", str(self.run.path), fix) for what in self.missing()]
            )
