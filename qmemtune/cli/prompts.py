"""Prompts that ``qmemtune generate`` is given: one, or those of a file or of stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmemtune.errors import Finding, UserError

BOM = "\ufeff"
"""What some editors put at the beginning of a file."""


@dataclass(frozen=True)
class Asked:
    """One prompt."""

    row: dict[str, Any]
    """``prompt`` or ``messages`` and perhaps ``instruction``, or the columns of a training row."""
    where: str | None = None
    """File and line; None for one that was given by itself."""

    def parts(self, fields: Sequence[str]) -> tuple[Any, str | None]:
        """What to answer, and the text for the instruction prior where the row gives it apart.

        A row of other columns is one of a training file: it has all that its prompt and that text are made of.

        Args:
            fields: of the run's prompt template.
        """
        for name in ("prompt", "messages"):
            if name in self.row and self.row.keys() <= {name, "instruction"} and len(fields) < 2:
                instruction = self.row.get("instruction")
                return self.row[name], instruction if isinstance(instruction, str) else None
        return self.row, None


def prompts(prompt: str | None, file: Path | None) -> list[Asked]:
    """The given prompt, or those of a file, or of stdin where neither is given.

    Raises:
        UserError: both are given, or the file cannot be read or holds no prompt.
    """
    if prompt is not None and file is not None:
        raise UserError("a prompt and a file of prompts are given", fix="give one of --prompt and --file")
    if prompt is not None:
        return [Asked({"prompt": prompt})]
    where = "stdin" if file is None else str(file)
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=where) from None
    is_jsonl = file is not None and file.suffix.lower() in (".jsonl", ".ndjson")
    # Not splitlines, which also breaks at characters that JSON has within its texts, such as U+2028.
    lines = [(number, line) for number, line in enumerate(text.removeprefix(BOM).split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError("holds no prompt", where=where, fix="write one prompt a line, or give --prompt")
    findings: list[Finding] = []
    asked = []
    for number, line in lines:
        place = f"{where}:{number}"
        asked.append(Asked(_row(line, place, findings) if is_jsonl else {"prompt": line}, place))
    if findings:
        raise UserError.many(findings)
    return asked


def _row(line: str, where: str, findings: list[Finding]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        findings.append(Finding(f"not valid JSON: {error}", where))
        return {}
    if not isinstance(row, dict) or not row or not all(row.get(name, " ") for name in ("prompt", "messages")):
        fix = 'write {"prompt": "..."}, {"messages": [...]} or the columns of a training row'
        findings.append(Finding("no prompt", where, fix))
        return {}
    if not isinstance(row.get("prompt", ""), str | list):
        findings.append(Finding("the prompt is no text", where, 'write {"prompt": "..."}'))
        return {}
    return row
