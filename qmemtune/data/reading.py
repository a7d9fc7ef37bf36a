"""From the rows of a source to examples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from qmemtune.config.data import DataConfig
from qmemtune.data.examples import Example, ExampleMaker
from qmemtune.data.mixture import heldout_source, keys_of, with_keys_of
from qmemtune.data.records import RawRow, Rejected
from qmemtune.data.report import DataReport, SourceReport
from qmemtune.data.sources import GENERATED, generated_rows, lacks_splits, read_rows
from qmemtune.errors import UserError


@dataclass
class Source:
    """Usable rows of one source."""

    examples: list[Example]
    report: SourceReport
    form: str
    config: DataConfig
    """The data options, with those of this source in their place."""
    heldout: list[Example] = field(default_factory=list)
    """Held-out rows that it brings itself."""


def grouped(examples: list[Example], name: str, config: DataConfig) -> list[Example]:
    """The examples of a set of that name; evaluations tell sets apart where nothing else groups them."""
    if name and config.group_by is None:
        for example in examples:
            example.group = name
    return examples


class Reading:
    """Reads sources, each with a report of its own.

    Args:
        config: the data options.
        report: takes the sources' reports.
    """

    def __init__(self, config: DataConfig, report: DataReport) -> None:
        self.config = config
        self.report = report

    def heldout(self) -> Source | None:
        """The source of held-out rows, if it is not the training rows."""
        own = heldout_source(self.config)
        if own is None:
            return None
        reason = lacks_splits(own.path, own.split) if self.config.eval_path is None else None
        if reason is not None:
            raise UserError(
                f"{reason}, so data.eval_split={own.split} names no rows of {own.path}",
                where="data.eval_split",
                fix="give the held-out rows with data.eval_path, or data.eval_split=null to hold out "
                "data.eval_fraction of the rows",
            )
        return self.source(own, own.split, heldout=True)

    def source(self, config: DataConfig, split: str, *, name: str = "", heldout: bool = False) -> Source:
        """Read a source and make examples of its rows.

        Args:
            config: the data options, with those of the source in their place.
            name: the source's in data.sources.
            heldout: whether it gives held-out rows only.

        Raises:
            UserError: nothing, or too little of it, can be used.
        """
        path = config.path
        label = path if split == self.config.split or name else f"{path} ({split})"
        if config.name is not None and (path.startswith(GENERATED) or Path(path).expanduser().exists()):
            text = f"data.name has no effect for {path}: only hub data sets have configurations"
            self.report.warn(with_keys_of(name, text))
        if not path.startswith(GENERATED):
            found = read_rows(path, name=config.name, split=split, streaming=config.streaming)
            return self._made(config, islice(found, self._rows_needed(heldout)), label, name)
        train, held = generated_rows(path)
        if heldout or self.config.eval_path is not None:
            return self._made(config, held if heldout else train, label, name)
        heldout_source = self._made(config, held, f"{path} (held-out rows)", "")
        source = self._made(config, train, f"{path} (training rows)", name)
        source.heldout = grouped(heldout_source.examples, name, config)
        return source

    def _rows_needed(self, heldout: bool) -> int | None:
        """How many rows of a source to read; None for all."""
        config = self.config
        if not config.streaming:
            return None
        if heldout:
            return config.max_eval_rows
        if config.max_train_rows is None:
            return None
        split_off = config.eval_fraction if config.eval_path is None and config.eval_split is None else 0.0
        return math.ceil(config.max_train_rows / (1 - split_off)) + 1

    def _made(self, config: DataConfig, found: Iterable[RawRow | Rejected], label: str, name: str) -> Source:
        report = SourceReport(label, name=name)
        self.report.sources.append(report)
        raw: list[RawRow] = []
        for row in found:
            report.read += 1
            if isinstance(row, RawRow):
                raw.append(row)
            else:
                report.rejected.append(row)
        if report.read == 0:
            report.fail("there are no rows")
        if not raw:
            report.fail("no row can be read")
        with keys_of(name):
            maker = ExampleMaker(config, raw)
            report.form = maker.form.name
            examples, rejected = maker.make(raw)
        report.rejected.extend(rejected)
        report.check(config.max_rejected)
        if not examples:
            report.fail("no row can be used")
        return Source(grouped(examples, name, config), report, maker.form.name, config)
