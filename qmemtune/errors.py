"""The error a user sees: what was found, where, and the way out."""

from __future__ import annotations

import errno
import re
from dataclasses import asdict, dataclass

WRITE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""A full disk, a quota, a limit on a file's size, a broken or read-only device."""


@dataclass(frozen=True)
class Finding:
    """One mistake, in words for the person who made it."""

    problem: str
    """What was found, one line."""
    where: str | None = None
    """File, row, key or override that holds it."""
    fix: str | None = None
    """The way out, as an instruction."""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        fix = f" -> {self.fix}" if self.fix else ""
        return f"{where}{self.problem}{fix}"


class UserError(Exception):
    """A mistake the user can mend (exit code 2).

    Args:
        problem: what was found, one line.
        where: file, row, key or override that holds it.
        fix: the way out.
    """

    exit_code = 2

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.findings: list[Finding] = [Finding(problem, where, fix)]
        super().__init__(str(self.findings[0]))

    @classmethod
    def many(cls, findings: list[Finding]) -> UserError:
        """One error that reports several findings together.

        Raises:
            ValueError: ``findings`` is empty.
        """
        if not findings:
            raise ValueError("an error needs at least one finding")
        error = cls.__new__(cls)
        error.findings = list(findings)
        Exception.__init__(error, "\n".join(str(f) for f in findings))
        return error

    def as_dict(self) -> dict[str, object]:
        """``{"problem", "where", "fix"}`` of the first finding, and all under ``findings`` if there are several."""
        first: dict[str, object] = asdict(self.findings[0])
        if len(self.findings) > 1:
            first["findings"] = [asdict(f) for f in self.findings]
        return first


class RunFailed(UserError):
    """Something failed that is not the user's mistake (exit code 1)."""

    exit_code = 1


class Diverged(RunFailed):
    """The loss of a run is no longer a number."""


def first_line(error: BaseException) -> str:
    """How an error's text begins: its first line, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# Of a full disk or an exceeded quota, as C++ and Rust libraries tell of it.
_WRITING = re.compile(
    r"inline_container\.cc|iostream error|PytorchStreamWriter"
    r"|(No space left on device|File too large|Disk quota exceeded|Read-only file system|Input/output error)",
)


def write_failure(error: BaseException) -> str | None:
    """Why a file could not be written in full, if that is what an error of any library says; else None."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in WRITE_FAULTS else None
    of_a_library = isinstance(error, RuntimeError) or "Safetensor" in type(error).__name__
    found = _WRITING.search(str(error)) if of_a_library else None
    return None if found is None else found[1] or "the disk takes no more"
