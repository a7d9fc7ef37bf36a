"""A study's folder: one run folder and one result for each cell, and what is made of all results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmemtune.errors import UserError
from qmemtune.rundir import RunDir, write_json
from qmemtune.study.cells import Cell, is_run_of


@dataclass(frozen=True)
class StudyDir:
    """Where each thing of a study lies."""

    path: Path

    @property
    def summary(self) -> Path:
        """All results and their statistics, JSON."""
        return self.path / "study.json"

    @property
    def tables(self) -> Path:
        """The same as Markdown."""
        return self.path / "study.md"

    @property
    def plots(self) -> Path:
        """Folder of PNG files."""
        return self.path / "plots"

    def run(self, cell: Cell) -> RunDir:
        """The run folder of a cell."""
        return RunDir(self.path / "cells" / cell.name)

    def result(self, cell: Cell) -> Path:
        """A finished cell's result, JSON."""
        return self.run(cell).path / "result.json"

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell that is done, with this very config; None if it is not."""
        try:
            stored: dict[str, Any] = json.loads(self.result(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"not valid JSON: {error}", where=str(self.result(cell)), fix="remove the file; its cell runs again"
            ) from None
        return stored if is_run_of(stored.get("config"), cell.config) else None

    def unfinished(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that are still to be run."""
        return [cell for cell in cells if self.finished(cell) is None]

    def write_result(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep the result of a cell; it is there whole or not at all."""
        write_json(self.result(cell), result)
