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

    def attempt(self, check: Callable[[], Result]) -> Result | None:
        """What a check gives, or None when it finds mistakes; those are kept, each once."""
        try:
            return check()
        except UserError as error:
            self.add(*error.findings)
            return None

    def add(self, *findings: Finding) -> None:
        """Keep findings that are not known yet."""
        self.found.extend(finding for finding in findings if finding not in self.found)

    def report(self) -> None:
        """Raise UserError with all of them, if there are any."""
        if self.found:
            raise UserError.many(self.found)
