"""metrics.jsonl and samples.jsonl: one JSON object a line, each with the step it belongs to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qmemtune.rundir import json_line


def plain(value: Any) -> Any:
    """Make a value JSON: numbers that JSON does not have (infinity, not-a-number) become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class JsonLines:
    """Appends lines to a file; each is on disk when :meth:`write` returns.

    Args:
        path: the file.
        enabled: False in the processes that write nothing.
        failed: takes the file and the error where a line cannot be written, which is otherwise raised.
    """

    def __init__(
        self, path: Path, *, enabled: bool = True, failed: Callable[[Path, OSError], None] | None = None
    ) -> None:
        self.path = path
        self.enabled = enabled
        self.failed = failed

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one object, all of it or nothing."""
        if not self.enabled:
            return
        try:
            self._append(json_line(plain(line)).encode())
        except OSError as error:
            if self.failed is None:
                raise
            self.failed(self.path, error)

    def _append(self, line: bytes) -> None:
        end = None
        try:
            with self.path.open("ab") as file:
                end = file.tell()
                file.write(line)
        except OSError:
            if end is not None:
                # Half a line would spoil the next one.
                os.truncate(self.path, end)
            raise

    def truncate(self, step: int, lines: int | None = None) -> None:
        """Drop the lines of steps after ``step``, and one that a crash cut off: a resumed run writes them anew.

        Args:
            step: -1 drops all.
            lines: how many there were after that step, where it is known: an evaluation at the end is of the last step
                too, and comes after its checkpoint.
        """
        if not self.enabled or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").split("\n")[:lines]:
            try:
                belongs_to = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if belongs_to <= step:
                kept.append(line + "\n")
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(self.path)


def count_lines(path: Path) -> int:
    """Lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
