"""What became of the rows: counts for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qmemtune.data.records import Rejected
from qmemtune.data.rows import TokenRows
from qmemtune.errors import Finding, UserError
from qmemtune.rundir import json_line

EXAMPLES_SHOWN = 3
REASONS_SHOWN = 8


@dataclass
class SourceReport:
    """One source of rows."""

    path: str
    form: str = ""
    """Row form."""
    read: int = 0
    """Rows found, usable or not."""
    rejected: list[Rejected] = field(default_factory=list)
    name: str = ""
    """Its name in data.sources."""
    weight: float = 1.0
    """How often its rows are used in one pass."""
    mixed_rows: int = 0
    """Rows of it in one pass over the mixture of data.sources."""
    mixed_tokens: int = 0
    """Their tokens."""

    def rows_by_reason(self) -> dict[str, list[Rejected]]:
        """Rejected rows by what is wrong with them, the most frequent first."""
        found: dict[str, list[Rejected]] = {}
        for row in self.rejected:
            found.setdefault(row.reason, []).append(row)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def by_reason(self) -> dict[str, int]:
        return {reason: len(rows) for reason, rows in self.rows_by_reason().items()}

    def place(self, row: Rejected) -> str:
        """Where a row is, seen from this source."""
        return f"line {row.line}" if row.file == self.path else f"{row.file}:line {row.line}"

    def places(self) -> dict[str, str]:
        """Reason -> where its first rows are."""
        return {
            reason: ", ".join(map(self.place, rows[:EXAMPLES_SHOWN])) + (", ..." if len(rows) > EXAMPLES_SHOWN else "")
            for reason, rows in self.rows_by_reason().items()
        }

    def check(self, max_rejected: float) -> None:
        """Raise UserError when more rows than ``max_rejected`` (a share below 1, else a count) cannot be used."""
        count = len(self.rejected)
        allowed = max_rejected * self.read if max_rejected < 1 else max_rejected
        if count > allowed:
            limit = f"{max_rejected:.1%}" if max_rejected < 1 else f"{max_rejected:.0f}"
            self.fail(f"{count} of {self.read} rows cannot be used (data.max_rejected allows {limit})")

    def fail(self, problem: str) -> None:
        """Raise UserError with the problem, the reasons by count and the first rows of each."""
        reasons = list(self.rows_by_reason().items())
        if not reasons:
            fix = "give a source with rows"
        elif "data.max_length" in reasons[0][0]:
            fix = "raise data.max_length; data.max_rejected=N leaves out up to N such rows"
        else:
            fix = "mend the rows; data.max_rejected=N leaves out up to N bad rows"
        findings = [Finding(problem, self.path, fix)]
        for reason, rows in reasons[:REASONS_SHOWN]:
            shown = "; ".join(
                self.place(row) + (f" ({row.detail})" if row.detail else "") + f": {row.excerpt[:80]}"
                for row in rows[:EXAMPLES_SHOWN]
            )
            findings.append(Finding(f"{len(rows)} x {reason}: {shown}", self.path))
        if len(reasons) > REASONS_SHOWN:
            findings.append(Finding(f"and {len(reasons) - REASONS_SHOWN} more reasons", self.path))
        raise UserError.many(findings)

    def as_dict(self) -> dict[str, Any]:
        facts = {"path": self.path, "format": self.form, "read": self.read, "rejected": self.by_reason()}
        if self.rejected:
            facts["rejected_at"] = self.places()
        if self.name:
            facts |= {"name": self.name, "weight": self.weight, "rows": self.mixed_rows, "tokens": self.mixed_tokens}
        return facts


@dataclass
class PartReport:
    """The rows of one side of the split, after tokenisation."""

    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    """Rows cut at max_length."""
    longest: int = 0
    """Tokens of the longest row, after the cut."""
    cut_tokens: int = 0
    """Tokens that were cut off."""
    continued: int = 0
    """Rows that go on with a plain text where max_length was reached."""

    def count(self, rows: TokenRows) -> None:
        """Count what the rows hold."""
        self.rows = len(rows)
        self.tokens = sum(rows.lengths)
        self.loss_tokens = sum(rows.loss_lengths)
        self.longest = max(rows.lengths, default=0)

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def line(self, name: str, max_length: int) -> str:
        if not self.rows:
            return f"{name}: no rows"
        cut = (
            f", {self.truncated:,} cut at {max_length:,} tokens ({self.cut_tokens:,} tokens lost)"
            if self.truncated
            else ""
        )
        cut += f", {self.continued:,} of them go on with a longer text" if self.continued else ""
        return (
            f"{name}: {self.rows:,} rows, {self.tokens:,} tokens ({self.loss_tokens:,} in the loss), "
            f"longest {self.longest:,}{cut}"
        )


@dataclass
class DataReport:
    """Everything counted while the data were prepared."""

    max_length: int = 0
    sources: list[SourceReport] = field(default_factory=list)
    train: PartReport = field(default_factory=PartReport)
    heldout: PartReport = field(default_factory=PartReport)
    removed_as_heldout: int = 0
    """Training rows left out because their prompt is also a held-out row's."""
    split_conversations: int = 0
    """Conversations that became several rows, one an answer, because the template rewrites earlier turns."""
    incomplete_conversations: int = 0
    """Conversations with a text that the chat template leaves out or changes."""
    warnings: list[str] = field(default_factory=list)
    cached_in: str = ""
    """File of the cache that held the tokenised rows."""

    def warn(self, warning: str | None) -> None:
        """Tell the user about it, once; None says nothing."""
        if warning is not None and warning not in self.warnings:
            self.warnings.append(warning)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [self.train.line("train", self.max_length), self.heldout.line("held out", self.max_length)]
        for source in self.sources:
            places = source.places()
            reasons = "; ".join(
                f"{count} x {reason} ({places[reason]})" for reason, count in source.by_reason().items()
            )
            lines.append(
                f"{source.path}: {source.read:,} rows read ({source.form or 'unknown'})"
                + (f", {len(source.rejected):,} rejected: {reasons}" if reasons else "")
            )
            if source.name:
                lines[-1] = (
                    f"{source.name}: {source.mixed_rows:,} rows a pass (weight {source.weight:g}, "
                    f"{source.mixed_tokens / max(self.train.tokens, 1):.1%} of the tokens) of {lines[-1]}"
                )
        if self.cached_in:
            lines.append(f"tokenised rows come from the cache ({self.cached_in})")
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def as_dict(self) -> dict[str, Any]:
        """The report for scripts."""
        return {
            "train": self.train.as_dict(),
            "heldout": self.heldout.as_dict(),
            "sources": [source.as_dict() for source in self.sources],
            "rejected": sum(len(source.rejected) for source in self.sources),
            "removed_as_heldout": self.removed_as_heldout,
            "split_conversations": self.split_conversations,
            "incomplete_conversations": self.incomplete_conversations,
            "warnings": list(self.warnings),
            "cached": bool(self.cached_in),
        }

    def state(self) -> dict[str, Any]:
        """All of it as plain values, see :meth:`from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> DataReport:
        """The report of a :meth:`state`."""
        sources = [
            SourceReport(**{**source, "rejected": [Rejected(**row) for row in source["rejected"]]})
            for source in state["sources"]
        ]
        parts = {name: PartReport(**state[name]) for name in ("train", "heldout")}
        return cls(**{**state, **parts, "sources": sources})

    def write_rejected(self, path: Path | None) -> None:
        """Write every rejected row to a JSON lines file, if there are any and a path is given."""
        rejected = [row for source in self.sources for row in source.rejected]
        if path is None or not rejected:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bytes that were not UTF-8 are surrogates here; escaped as JSON writes them they stay readable.
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rejected:
                record = {
                    "file": row.file,
                    "line": row.line,
                    "reason": row.reason,
                    "detail": row.detail,
                    "excerpt": row.excerpt,
                }
                file.write(json_line(record))
