"""From the data options to tokenised training and held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmemtune.config.schema import MISSING, DataConfig
from qmemtune.data.encode import Encoder
from qmemtune.data.examples import Example, ExampleMaker
from qmemtune.data.formats import CONVERSATIONS
from qmemtune.data.records import RawRow, Rejected
from qmemtune.data.render import Renderer
from qmemtune.data.report import DataReport, PartReport, SourceReport
from qmemtune.data.rows import TokenRows
from qmemtune.data.sources import GENERATED, generated_rows, read_rows
from qmemtune.data.split import split_rows, without_heldout
from qmemtune.data.tokenize import tokenize
from qmemtune.errors import UserError


@dataclass
class PreparedData:
    """Rows ready for training and evaluation."""

    train: TokenRows
    heldout: TokenRows
    report: DataReport
    format: str
    """Row form of the training rows (of the held-out ones if only those were read)."""


@dataclass
class Source:
    """Usable rows of one source."""

    examples: list[Example]
    report: SourceReport
    form: str


def prepare_data(config: DataConfig, tokenizer: Any, *, rejected_path: Path | None = None) -> PreparedData:
    """Read, check, split and tokenise the rows.

    Args:
        config: the data options.
        tokenizer: a transformers tokenizer.
        rejected_path: where rows that cannot be used are written, one JSON object a line (also when this raises).

    Raises:
        UserError: a source cannot be read, too many of its rows cannot be used, or none is left.
    """
    return Preparation(config, tokenizer, rejected_path).run(with_train=True)


def prepare_heldout(config: DataConfig, tokenizer: Any, *, rejected_path: Path | None = None) -> PreparedData:
    """The same held-out rows as :func:`prepare_data`, without tokenising the training rows (``train`` is empty)."""
    return Preparation(config, tokenizer, rejected_path).run(with_train=False)


class Preparation:
    """One pass from options to rows; collects the report on the way."""

    def __init__(self, config: DataConfig, tokenizer: Any, rejected_path: Path | None) -> None:
        if not config.path or config.path == MISSING:
            raise UserError("no data are given", where="data.path", fix="data.path=FILE, a hub id or generated:NAME")
        if not 0 <= config.eval_fraction < 1:
            raise UserError("must be at least 0 and below 1", where="data.eval_fraction")
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.rejected_path = rejected_path
        self.report = DataReport(max_length=config.max_length)

    def run(self, *, with_train: bool) -> PreparedData:
        try:
            return self._run(with_train)
        finally:
            self.report.write_rejected(self.rejected_path)

    def _run(self, with_train: bool) -> PreparedData:
        config = self.config
        apart = self._heldout_source()
        train = self._source(config.path, config.split) if with_train or apart is None else None
        if apart is None:
            assert train is not None
            trained, held, warning = split_rows(train.examples, config.eval_fraction, config.split_seed)
            self._warn(warning)
            held_source: Source = train
        else:
            held, held_source = apart.examples, apart
            trained, self.report.removed_as_heldout = without_heldout(train.examples if train else [], held)
            if self.report.removed_as_heldout:
                self._warn(
                    f"{self.report.removed_as_heldout} training rows have the prompt of a held-out row "
                    "and are left out of training"
                )
                if not trained and train is not None:
                    raise UserError(
                        "every training row has the prompt of a held-out row",
                        where=f"{config.path}, {config.eval_path}",
                    )
        held_rows = self._tokenized(held[: config.max_eval_rows], held_source, self.report.heldout)
        if apart is not None and not held_rows:
            apart.report.fail("no held-out row can be used")
        train_rows = TokenRows()
        if with_train and train is not None:
            train_rows = self._tokenized(trained[: config.max_train_rows], train, self.report.train)
            if not train_rows:
                train.report.fail("no training row can be used")
        for source in self.report.sources:
            source.check(config.max_rejected)
        if config.eval_fraction > 0 and not held_rows:
            self._warn("no held-out row is left, so nothing can be evaluated")
        self._advise(train or held_source)
        return PreparedData(train_rows, held_rows, self.report, (train or held_source).form)

    def _heldout_source(self) -> Source | None:
        """The source of held-out rows, if it is not the training rows."""
        config = self.config
        if config.eval_path is not None:
            return self._source(config.eval_path, config.eval_split or config.split, heldout=True)
        if config.path.startswith(GENERATED):
            return self._source(config.path, config.split, heldout=True)
        if config.eval_split is not None:
            if Path(config.path).expanduser().is_file():
                raise UserError(
                    "a file has no splits, so data.eval_split has no effect",
                    where="data.eval_split",
                    fix="give the held-out rows with data.eval_path, or leave data.eval_split out",
                )
            return self._source(config.path, config.eval_split, heldout=True)
        return None

    def _source(self, path: str, split: str, *, heldout: bool = False) -> Source:
        """Read a source and make examples of its rows.

        Raises:
            UserError: nothing, or too little of it, can be used.
        """
        found: Iterable[RawRow | Rejected]
        if path.startswith(GENERATED):
            found = generated_rows(path)[1 if heldout else 0]
            label = f"{path} ({'held-out' if heldout else 'training'} rows)"
        else:
            found = read_rows(path, name=self.config.name, split=split)
            label = path if split == self.config.split else f"{path} ({split})"
        if self.config.name is not None and (path.startswith(GENERATED) or Path(path).expanduser().exists()):
            self._warn(f"data.name has no effect for {path}: only hub data sets have configurations")
        report = SourceReport(label)
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
        maker = ExampleMaker(self.config, raw)
        report.form = maker.form.name
        examples, rejected = maker.make(raw)
        report.rejected.extend(rejected)
        report.check(self.config.max_rejected)
        if not examples:
            report.fail("no row can be used")
        return Source(examples, report, maker.form.name)

    def _tokenized(self, examples: list[Example], source: Source, part: PartReport) -> TokenRows:
        renderer = Renderer(self.config, source.form, self.tokenizer, self.encoder)
        rows, rejected = tokenize(examples, renderer, self.config, part, self.report)
        source.report.rejected.extend(rejected)
        if renderer.chat is not None:
            self.report.incomplete_conversations += renderer.chat.incomplete
        if renderer.chat is not None and not renderer.chat.ends_turns:
            self._warn("the chat template ends answers without a special token: generation may not stop by itself")
        return rows

    def _advise(self, source: Source) -> None:
        is_chat = source.form in CONVERSATIONS or self.config.chat == "always"
        if not is_chat and self.encoder.eos_token_id is None:
            self._warn("the tokenizer has no end-of-sequence token: the model does not learn to stop")
        if self.report.split_conversations:
            self._warn(
                f"{self.report.split_conversations} conversations became one row an answer: "
                "the chat template writes earlier turns differently once later ones follow"
            )

        if self.report.incomplete_conversations:
            self._warn(
                f"{self.report.incomplete_conversations} conversations hold a text that the chat template leaves out "
                "or changes (some drop system prompts or earlier reasoning): look at a few with `qmemtune data`"
            )

    def _warn(self, warning: str | None) -> None:
        if warning is not None and warning not in self.report.warnings:
            self.report.warnings.append(warning)
