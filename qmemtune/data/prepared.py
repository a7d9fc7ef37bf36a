"""What the data options become: rows ready for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmemtune.data.report import DataReport
from qmemtune.data.rows import TokenRows


@dataclass
class PreparedData:
    """Rows ready for training and evaluation."""

    train: TokenRows
    heldout: TokenRows
    report: DataReport
    format: str
    """Row form of the training rows (of the held-out ones if only those were read)."""

    @property
    def tokens(self) -> int:
        """In all training rows."""
        return self.report.train.tokens

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the rows."""
        return self.report.warnings

    def as_dict(self) -> dict[str, Any]:
        """The report for scripts."""
        return self.report.as_dict()
