"""Several checks, one report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qmemtune.errors import Finding, UserError

Result = TypeVar("Result")


class Findings:
    """Collects what checks find, so that all of it is told at once."""

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self.kinds: set[type[UserError]] = set()
        """Of the errors that they came with."""

    def attempt(self, check: Callable[[], Result]) -> Result | None:
        """What a check gives, or None when it finds mistakes; those are kept, each once."""
        try:
            return check()
        except UserError as error:
            self.add(*error.findings)
            self.kinds.add(type(error))
            return None

    def add(self, *findings: Finding) -> None:
        """Keep findings that are not known yet."""
        self.found.extend(finding for finding in findings if finding not in self.found)

    def report(self) -> None:
        """Raise UserError with all of them, if there are any; its special kind, if they are all of one."""
        if self.found:
            raise (next(iter(self.kinds)) if len(self.kinds) == 1 else UserError).many(self.found)
