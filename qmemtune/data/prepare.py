"""From the data options to tokenised training and held-out rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qmemtune.config.data import DataConfig, is_chat
from qmemtune.config.missing import MISSING
from qmemtune.data.cache import cache_entry, content
from qmemtune.data.encode import Encoder
from qmemtune.data.examples import LOOK_AT, Example
from qmemtune.data.mixture import first_of_mixture, keys_of, mixed, repeated, source_configs, with_keys_of
from qmemtune.data.prepared import PreparedData
from qmemtune.data.reading import Reading, Source
from qmemtune.data.render import Renderer
from qmemtune.data.report import DataReport, PartReport
from qmemtune.data.rows import TokenRows
from qmemtune.data.split import split_rows, without_heldout
from qmemtune.data.templates import joined
from qmemtune.data.tokenize import tokenize
from qmemtune.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""
BOUNDARY = re.compile(r"[A-Za-z0-9.,;:?!)\]][A-Za-z0-9]")
"""The last sign of a prompt and the first of its completion, where a blank was likely forgotten."""


def silent(what: str, done: int, total: int) -> None:
    """Says nothing."""


def prepare_data(
    config: DataConfig, tokenizer: Any, *, rejected_path: Path | None = None, progress: Progress = silent
) -> PreparedData:
    """Read, check, split and tokenise the rows, or take them from the cache.

    Args:
        config: the data options.
        tokenizer: a transformers tokenizer.
        rejected_path: where rows that cannot be used are written, one JSON object a line (also when this raises).
        progress: called with what is being done, rows done and rows in all.

    Raises:
        UserError: a source cannot be read, too many of its rows cannot be used, or none is left.
    """
    entry = cache_entry(config, tokenizer)
    found = None if entry is None else entry.load()
    if found is not None:
        found.report.write_rejected(rejected_path)
        return found
    prepared = Preparation(config, tokenizer, rejected_path, progress).run(with_train=True)
    # A file that changed meanwhile has another name by now.
    if entry is not None and content(config) == entry.content:
        entry.store(prepared)
    return prepared


def prepare_heldout(
    config: DataConfig, tokenizer: Any, *, rejected_path: Path | None = None, progress: Progress = silent
) -> PreparedData:
    """The same held-out rows as :func:`prepare_data`, without tokenising the training rows (``train`` is empty)."""
    entry = cache_entry(config, tokenizer)
    found = None if entry is None else entry.load()
    if found is not None:
        found.report.write_rejected(rejected_path)
        found.report.train = PartReport()
        return PreparedData(TokenRows(), found.heldout, found.report, found.format)
    return Preparation(config, tokenizer, rejected_path, progress).run(with_train=False)


def glued(examples: Sequence[Example], config: DataConfig) -> str | None:
    """A warning where most prompts run straight into their completions, as columns often do that nobody has joined.

    Signs that open something, or end a mark such as ``<|assistant|>``, are taken to be meant so.
    """
    ends = [(joined(example.prompt)[-1:], joined(example.completion)[:1]) for example in examples]
    runs = [i for i, (last, first) in enumerate(ends) if last + first and BOUNDARY.fullmatch(last + first)]
    if not runs or 2 * len(runs) <= len(ends):
        return None
    example = examples[runs[0]]
    shown = f"{joined(example.prompt)[-20:]}{joined(example.completion)[:20]}".replace("\n", " ")
    way = "" if config.prompt_template else " -> data.prompt_template=$'{prompt}\\n' puts a line break between them"
    return f"prompts run straight into their completions, such as '...{shown}...'{way}"


class Preparation:
    """One pass from options to rows; collects the report on the way."""

    def __init__(self, config: DataConfig, tokenizer: Any, rejected_path: Path | None, progress: Progress) -> None:
        if not config.sources and (not config.path or config.path == MISSING):
            raise UserError("no data are given", where="data.path", fix="data.path=FILE, a hub id or generated:NAME")
        if not 0 <= config.eval_fraction < 1:
            raise UserError("must be at least 0 and below 1", where="data.eval_fraction")
        self.config = config
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.rejected_path = rejected_path
        self.progress = progress
        self.report = DataReport(max_length=config.max_length)
        self.reading = Reading(config, self.report)
        self.trained: list[Example] = []
        self.held: list[Example] = []

    def run(self, *, with_train: bool) -> PreparedData:
        try:
            return self._run(with_train)
        finally:
            self.report.write_rejected(self.rejected_path)

    def _run(self, with_train: bool) -> PreparedData:
        config = self.config
        configs = source_configs(config)
        apart = self.reading.heldout()
        sources: dict[str, Source] = {}
        if with_train or apart is None:
            sources = {name: self.reading.source(own, own.split, name=name) for name, own in configs.items()}
        trained, held = self._split(sources, apart)
        for name, source in sources.items():
            source.report.weight = config.sources[name].weight if name else 1.0
            self.held.extend(held[name])
        if apart is not None:
            self.held.extend(apart.examples)
        held_rows = self._heldout_rows(sources, apart, held)
        if apart is not None and not held_rows:
            apart.report.fail("no held-out row can be used")
        train_rows = self._train_rows(sources, trained) if with_train else TokenRows()
        for report in self.report.sources:
            report.check(config.max_rejected)
        if config.eval_fraction > 0 and not held_rows:
            self.report.warn("no held-out row is left, so nothing can be evaluated")
        elif not held_rows:
            self.report.warn("data.eval_fraction=0 holds no row out, so nothing can be evaluated")
        self.report.train.count(train_rows)
        self.report.heldout.count(held_rows)
        first = next(iter(sources.values()), apart)
        assert first is not None
        self._advise(first)
        return PreparedData(train_rows, held_rows, self.report, first.form)

    def _split(
        self, sources: dict[str, Source], apart: Source | None
    ) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
        """Training and held-out rows of each set, no prompt of any held-out row among the training rows."""
        config = self.config
        trained = {name: source.examples for name, source in sources.items()}
        held: dict[str, list[Example]] = {name: source.heldout for name, source in sources.items()}
        if apart is None:
            for name, source in sources.items():
                if not source.heldout:
                    trained[name], held[name], warning = split_rows(
                        source.examples, config.eval_fraction, config.split_seed
                    )
                    self.report.warn(warning)
        for name in trained:
            # Within one set the split has seen to it, as far as that is possible.
            others = [example for other in held for example in held[other] if other != name or sources[name].heldout]
            others += [] if apart is None else apart.examples
            trained[name], removed = without_heldout(trained[name], others)
            self.report.removed_as_heldout += removed
        if self.report.removed_as_heldout:
            self.report.warn(
                f"{self.report.removed_as_heldout} training rows have the prompt of a held-out row "
                "and are left out of training"
            )
            if not any(trained.values()):
                raise UserError(
                    "every training row has the prompt of a held-out row",
                    where=f"{config.path}, {config.eval_path or f'split {config.eval_split}'}",
                    fix="give a data.eval_path with other rows, or leave it out: data.eval_fraction of the rows is "
                    "held out then",
                )
        return trained, held

    def _train_rows(self, sources: dict[str, Source], trained: dict[str, list[Example]]) -> TokenRows:
        config = self.config
        chosen, parts = dict(trained), dict[str, TokenRows]()
        for name, source in sources.items():
            if source.report.weight < 1:
                order = repeated(len(chosen[name]), source.report.weight, [config.split_seed, *name.encode()])
                chosen[name] = [chosen[name][i] for i in order]
        kept, weights = first_of_mixture(
            {name: len(chosen[name]) for name in sources},
            {name: max(source.report.weight, 1.0) for name, source in sources.items()},
            config.max_train_rows,
        )
        for name, source in sources.items():
            own = chosen[name][: kept[name]]
            self.trained.extend(own)
            parts[name] = self._tokenized(own, source, self.report.train, "training rows")
            if not parts[name]:
                source.report.fail("no training row can be used")
        if not config.sources:
            # A text or a conversation may have become several rows.
            return parts[""][: config.max_train_rows]
        rows = mixed(parts, weights, config.split_seed)[: config.max_train_rows]
        bounds = np.cumsum([0, *(len(part.table) for part in parts.values())])
        lengths, owner = np.asarray(rows.lengths), np.searchsorted(bounds, rows.order, side="right") - 1
        for number, source in enumerate(sources.values()):
            source.report.mixed_rows = int((owner == number).sum())
            source.report.mixed_tokens = int(lengths[owner == number].sum())
        return rows

    def _heldout_rows(
        self, sources: dict[str, Source], apart: Source | None, held: dict[str, list[Example]]
    ) -> TokenRows:
        limit, part = self.config.max_eval_rows, self.report.heldout
        if apart is not None:
            return self._tokenized(apart.examples[:limit], apart, part, "held-out rows")[:limit]
        alike = dict.fromkeys(sources, 1.0)
        kept, _ = first_of_mixture({name: len(held[name]) for name in sources}, alike, limit)
        rows = {
            name: self._tokenized(held[name][: kept[name]], source, part, "held-out rows")
            for name, source in sources.items()
        }
        return (mixed(rows, alike, 0) if len(rows) > 1 else next(iter(rows.values())))[:limit]

    def _tokenized(self, examples: list[Example], source: Source, part: PartReport, what: str) -> TokenRows:
        with keys_of(source.report.name):
            renderer = Renderer(source.config, source.form, self.tokenizer, self.encoder)
        if part is self.report.train and renderer.chat is None:
            warning = glued(examples[:LOOK_AT], source.config)
            self.report.warn(warning and with_keys_of(source.report.name, warning))
        shown = f"tokenise {what}" if not source.report.name else f"tokenise {what} of {source.report.name}"
        rows, rejected = tokenize(
            examples, renderer, source.config, part, self.report, lambda done: self.progress(shown, done, len(examples))
        )
        source.report.rejected.extend(rejected)
        if renderer.chat is not None:
            self.report.incomplete_conversations += renderer.chat.incomplete
            if not renderer.chat.ends_turns:
                self.report.warn(
                    "the chat template ends answers without a special token: generation may not stop by itself"
                )
        return rows

    def _advise(self, source: Source) -> None:
        chat = is_chat(source.config, source.form)
        if not chat and self.encoder.eos_token_id is None:
            self.report.warn("the tokenizer has no end-of-sequence token: the model does not learn to stop")
        if chat and "strftime_now" in str(self.tokenizer.chat_template):
            self.report.warn(
                "the chat template writes the day's date into rows: on another day, without the cache, they are others "
                "(for a fixed date give a template of your own: model.chat_template=FILE)"
            )
        if self.report.split_conversations:
            self.report.warn(
                f"{self.report.split_conversations} conversations became one row an answer: "
                "the chat template writes earlier turns differently once later ones follow"
            )
        if self.report.incomplete_conversations:
            self.report.warn(
                f"{self.report.incomplete_conversations} conversations hold a text that the chat template leaves out "
                "or changes (some drop system prompts or earlier reasoning): look at a few with `qmemtune data`"
            )
