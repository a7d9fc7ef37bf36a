"""Rows to examples: the row form recognised, templates filled in, every row checked."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmemtune.config.data import CONVERSATIONS, DataConfig
from qmemtune.data.conversations import Message
from qmemtune.data.formats import FORMS, Fields, Form, Parts
from qmemtune.data.records import RawRow, Rejected, RowError, as_text, is_blank, is_unicode
from qmemtune.data.templates import TextParts, TextTemplate, joined
from qmemtune.errors import Finding, UserError

LOOK_AT = 1000
"""Rows by which the form is recognised."""


@dataclass(slots=True)
class Example:
    """One row, ready to be rendered."""

    user: str
    prompt: TextParts
    completion: TextParts
    messages: list[Message]
    muted: frozenset[int]
    tools: list[dict[str, Any]]
    system: str
    instruction: str
    group: str
    raw: RawRow

    @property
    def answer(self) -> str:
        """The reference answer; in a conversation the last one."""
        if not self.messages:
            return joined(self.completion)
        last = self.messages[-1]
        return last["content"] or json.dumps([call["function"] for call in last["tool_calls"]], ensure_ascii=False)

    def prompt_key(self) -> str:
        """What two rows share if they ask the same: system prompt and everything before the last answer.

        A plain text asks nothing: it is its own key.
        """
        if self.messages:
            return json.dumps([self.system, self.messages[:-1]], ensure_ascii=False)
        if not self.prompt:
            return json.dumps([joined(self.completion)], ensure_ascii=False)
        return json.dumps([self.system, joined(self.prompt)], ensure_ascii=False)


class ExampleMaker:
    """Makes examples of the rows of one source.

    Args:
        config: the data options.
        rows: the source's rows, by which the form is recognised and column names are checked.

    Raises:
        UserError: no form fits, or an option names a column that no row has.
    """

    def __init__(self, config: DataConfig, rows: Sequence[RawRow]) -> None:
        self.config = config
        self.columns = dict(config.columns)
        self.prompt_template = template(config.prompt_template, "data.prompt_template")
        self.completion_template = template(config.completion_template, "data.completion_template")
        self.remove = removal_pattern(config.remove_pattern)
        known = list(dict.fromkeys(key for row in rows for key in row.values if isinstance(key, str)))
        check_columns(config, known)
        self.form = self.chosen_form(rows[:LOOK_AT], known)
        unknown = sorted(set(self.columns) - set(self.form.fields) - {"instruction"})
        if unknown:
            raise UserError(
                f"{', '.join(unknown)}: no field of the form '{self.form.name}'",
                where="data.columns",
                fix=f"its fields are {', '.join(self.form.fields)} (field: column)",
            )
        missing = [self.columns.get(field, field) for field in self.needed(self.form)]
        missing = [column for column in missing if column not in known]
        if missing:
            raise UserError(
                f"the form '{self.form.name}' needs the column {' and '.join(missing)}, which no row has",
                where=rows[0].file,
                fix=f"data.columns='{{FIELD: COLUMN}}' says which column is which; the columns are {', '.join(known)}",
            )
        for text_template in (self.prompt_template, self.completion_template):
            if text_template is not None:
                text_template.check([*known, *(self.columns if known else text_template.fields)])
        if config.instruction == "column" and known and self.columns.get("instruction", "instruction") not in known:
            raise UserError(
                f"data.instruction is 'column', and no row has the column "
                f"'{self.columns.get('instruction', 'instruction')}'",
                where="data.instruction",
                fix=f"data.columns='{{instruction: COLUMN}}' with one of {', '.join(known)}",
            )
        self.check_templates()

    def check_templates(self) -> None:
        """Raise UserError for options that the form has no use for."""
        form = self.form.name
        if form in CONVERSATIONS and (self.prompt_template or self.completion_template):
            raise UserError(
                f"prompt_template and completion_template do not apply to {form} rows",
                where="data.prompt_template" if self.prompt_template else "data.completion_template",
                fix="leave them out; model.chat_template changes how conversations are rendered",
            )
        unused = {"data.prompt_template": self.prompt_template, "data.system": self.config.system}
        for key, given in unused.items():
            if form == "text" and given:
                raise UserError(
                    "plain text has no prompt, so this does not apply to it",
                    where=key,
                    fix="leave it out, or name another form with data.format=",
                )

    def chosen_form(self, rows: Sequence[RawRow], known: Sequence[str]) -> Form:
        if self.config.format != "auto":
            return FORMS[self.config.format]
        needed = {form.name: self.needed(form) for form in FORMS.values()}
        fits = {
            name: sum(all(self.columns.get(field, field) in row.values for field in fields) for row in rows)
            for name, fields in needed.items()
        }
        best = max(fits.values())
        if best == 0 and rows:
            forms = "; ".join(f"{form.name}: {', '.join(form.required)}" for form in FORMS.values())
            raise UserError(
                f"the columns {', '.join(known) or '(none)'} fit no row form ({forms})",
                where=rows[0].file,
                fix="say which column is which, for example data.columns='{prompt: question, completion: answer}'",
            )
        names = [name for name, count in fits.items() if count == best]
        # Where templates make columns dispensable, the form with more columns really present is meant.
        weight = {name: len(needed[name]) for name in names}
        names = [name for name in names if weight[name] == max(weight.values())]
        if len(names) > 1 and max(weight.values()) > 0 and rows:
            raise UserError(
                f"the rows fit more than one form: {', '.join(names)}",
                where=rows[0].file,
                fix=f"name one: data.format={names[0]}",
            )
        return FORMS[names[0]]

    def needed(self, form: Form) -> list[str]:
        """Fields whose columns must be there, given the templates."""
        spared = set()
        if self.prompt_template is not None:
            spared.add(form.prompt_field)
        if self.completion_template is not None:
            spared.add(form.completion_field)
        return [field for field in form.required if field not in spared]

    def make(self, rows: Iterable[RawRow]) -> tuple[list[Example], list[Rejected]]:
        """Examples of the rows that can be used, and the others with their reasons."""
        examples, rejected = [], []
        for row in rows:
            try:
                examples.append(self.example(row))
            except RowError as error:
                rejected.append(row.rejected(error))
        return examples, rejected

    def example(self, row: RawRow) -> Example:
        prompt = self.filled(self.prompt_template, row, "prompt")
        completion = self.filled(self.completion_template, row, "completion")
        parts = self.form.parse(
            Fields(
                row.values,
                self.columns,
                None if prompt is None else joined(prompt),
                None if completion is None else joined(completion),
            )
        )
        if self.form.name != "text":
            prompt = prompt or ((False, parts.prompt),)
        completion = completion or ((False, parts.completion),)
        if self.remove is not None:
            completion = tuple((own, self.remove.sub("", text)) for own, text in completion)
            for message in parts.messages:
                if message["role"] == "assistant":
                    message["content"] = self.remove.sub("", message["content"])
            answers = [m["content"] for m in parts.messages if m["role"] == "assistant" and "tool_calls" not in m]
            if any(is_blank(text) for text in (answers if parts.messages else [joined(completion)])):
                raise RowError("nothing of the completion is left after data.remove_pattern")
        system = parts.system or self.config.system or ""
        if system and parts.messages and not any(m["role"] in ("system", "developer") for m in parts.messages):
            parts.messages.insert(0, {"role": "system", "content": system})
            parts.muted = frozenset(i + 1 for i in parts.muted)
        return Example(
            user=parts.user,
            prompt=prompt or (),
            completion=completion,
            messages=parts.messages,
            muted=parts.muted,
            tools=parts.tools,
            system=system,
            instruction=self.instruction(parts, system, row),
            group=self.group(row),
            raw=row,
        )

    def filled(self, text_template: TextTemplate | None, row: RawRow, part: str) -> TextParts | None:
        if text_template is None or self.form.name in CONVERSATIONS:
            return None
        text = text_template.render(lambda name: self.column_text(row.values, name))
        if is_blank(joined(text)):
            raise RowError(f"the {part} is empty")
        return text

    def column_text(self, values: Mapping[str, Any], name: str) -> str:
        """A column as text for a template; numbers are written out."""
        column = name if name in values else self.columns.get(name, name)
        value = values.get(column)
        if value is None and self.form.name == "alpaca" and column == self.columns.get("input", "input"):
            return ""
        if column not in values:
            raise RowError(f"column '{column}' is missing")
        if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            try:
                return str(value)
            except ValueError:  # thousands of digits
                raise RowError(f"column '{column}' is too long a number") from None
        return as_text(value, f"column '{column}'")

    def instruction(self, parts: Parts, system: str, row: RawRow) -> str:
        match self.config.instruction:
            case "none":
                return ""
            case "system":
                return system
            case "column":
                return Fields(row.values, self.columns).optional("instruction")
            case _:
                return parts.instruction

    def group(self, row: RawRow) -> str:
        if self.config.group_by is None:
            return ""
        value = row.values.get(self.config.group_by)
        text = value if isinstance(value, str) else "" if value is None else json.dumps(value, default=repr)
        return text if is_unicode(text) else repr(text)


def template(text: str | None, key: str) -> TextTemplate | None:
    return None if text is None else TextTemplate(text, key)


def removal_pattern(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"not a regular expression: {error}", where="data.remove_pattern", fix="escape special characters with \\"
        ) from error


def check_columns(config: DataConfig, known: Sequence[str]) -> None:
    """Raise UserError for every option that names a column which no row has."""
    if not known:
        return
    named = [(f"data.columns.{field}", column) for field, column in config.columns.items()]
    if config.group_by is not None:
        named.append(("data.group_by", config.group_by))
    findings = []
    for key, column in named:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            columns = f"the columns are {', '.join(known)}"
            fix = f"did you mean '{near[0]}'? {columns}" if near else columns
            findings.append(Finding(f"no row has the column '{column}'", key, fix))
    if findings:
        raise UserError.many(findings)
