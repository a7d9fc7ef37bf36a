"""Examples to segments, for training and for ``generate`` alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from qmemtune.config.data import CONVERSATIONS, DataConfig, is_chat
from qmemtune.data.chat import ChatRenderer
from qmemtune.data.conversations import Message, check_message
from qmemtune.data.encode import Encoder, Segment
from qmemtune.data.examples import Example, ExampleMaker, template
from qmemtune.data.formats import FORMS, alpaca_prompt
from qmemtune.data.mixture import first_source
from qmemtune.data.records import RawRow, RowError, as_text
from qmemtune.data.sources import GENERATED, generated_rows, read_rows
from qmemtune.data.templates import TextParts
from qmemtune.errors import UserError

ANSWER = "-"
"""Stands for the answer of a row that has none."""


class Renderer:
    """Renders rows of one form.

    Args:
        config: the data options.
        form: name of the row form.
        tokenizer: a transformers tokenizer.
        encoder: its encoder, if there is one already.

    Raises:
        UserError: the rows need a chat template and there is none that can be used.
    """

    def __init__(self, config: DataConfig, form: str, tokenizer: Any, encoder: Encoder | None = None) -> None:
        self.config = config
        self.form = form
        self.encoder = encoder or Encoder(tokenizer)
        if form in CONVERSATIONS and config.chat == "never":
            raise UserError(
                f"{form} rows are conversations and cannot be rendered without a chat template",
                where="data.chat",
                fix="set data.chat=auto, or turn the rows into prompt and completion columns",
            )
        if form == "text" and config.chat == "always":
            raise UserError(
                "plain text has no turns and cannot be rendered as a chat",
                where="data.chat",
                fix="set data.chat=auto, or turn the rows into prompt and completion columns",
            )
        self.chat = ChatRenderer(tokenizer, self.encoder) if is_chat(config, form) else None

    def training_rows(self, example: Example) -> list[list[Segment]]:
        """Rows of segments; the last segment is the (last) answer, all before it are its prompt.

        Raises:
            RowError: the row cannot be rendered.
        """
        if self.chat is not None:
            conversation = example.messages or [
                *self._system(example.system),
                {"role": "user", "content": example.user},
                {"role": "assistant", "content": example.answer},
            ]
            last_turn = self.config.loss_on == "last_turn"
            return self.chat.training_rows(conversation, example.muted, tools=example.tools, last_turn=last_turn)
        completion = Segment(self._pieces(example.completion), loss=True, eos=True)
        if not example.prompt:
            return [[completion]]
        return [[self._plain_prompt(example.system, example.prompt), completion]]

    def prompt_ids(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of a prompt: with what the tokenizer puts before a text, unless a chat template does that."""
        leading = [] if self.chat is not None else self.encoder.bos_ids
        return [*leading, *(token for ids in self.encoder.encode([segments])[0] for token in ids)]

    def prompt(self, prompt: TextParts | Sequence[Message], user: str) -> list[Segment]:
        """Segments of a prompt: a conversation, or text (dressed for plain rendering, bare as ``user`` for a chat)."""
        system = self.config.system or ""
        if self.chat is None:
            return [self._plain_prompt(system, tuple(prompt))]  # type: ignore[arg-type]
        conversation = [m for m in prompt if isinstance(m, dict)] or [{"role": "user", "content": user}]
        if not any(m["role"] in ("system", "developer") for m in conversation):
            conversation = [*self._system(system), *conversation]
        return self.chat.prompt(conversation)

    def prompt_of(self, example: Example) -> list[Segment]:
        """Segments of an example's prompt, as they stand before its (last) answer."""
        if self.chat is None:
            return [self._plain_prompt(example.system, example.prompt)]
        asked = [*self._system(example.system), {"role": "user", "content": example.user}]
        return self.chat.prompt(example.messages[:-1] or asked, example.tools)

    @staticmethod
    def _system(text: str) -> list[Message]:
        return [{"role": "system", "content": text}] if text else []

    def _plain_prompt(self, system: str, prompt: TextParts) -> Segment:
        if system:
            prompt = ((False, f"{system}\n\n"), *prompt)
        return Segment(self._pieces(prompt), loss=False)

    def _pieces(self, parts: TextParts) -> tuple[str, ...]:
        """Pieces in which special tokens are recognised where an option's text holds them, never in a row's text."""
        pieces = [""]
        for own, text in parts:
            first, *rest = (text,) if own else self.encoder.protected(text)
            pieces[-1] += first
            pieces.extend(rest)
        return tuple(pieces)


def render_prompt(
    config: DataConfig, tokenizer: Any, prompt: str | Sequence[Message], *, form: str | None = None
) -> list[int]:
    """Token ids that ``generate`` is fed for a prompt: rendered as the prompts of the training rows were.

    Args:
        config: the data options of the run; of several sets the first one's.
        tokenizer: the run's tokenizer.
        prompt: the prompt's text (the one field of the prompt template, if there is one), or a conversation that ends
            with the turn to answer.
        form: name of the row form; without it ``config.format``, and for auto the form of the training rows, if they
            are still there.

    Raises:
        UserError: the prompt does not fit the rendering, or is empty.
    """
    config = first_source(config)
    if not isinstance(prompt, str):
        try:
            conversation = [check_message(message, number) for number, message in enumerate(prompt, start=1)]
            if not conversation or conversation[-1]["role"] == "assistant":
                raise RowError("the conversation must end with a turn to answer")
            renderer = Renderer(config, "messages", tokenizer)
            return renderer.prompt_ids(renderer.prompt(conversation, ""))
        except RowError as error:
            raise UserError(str(error), where="prompt") from error
    form = form or form_of(config)
    renderer = Renderer(config, form, tokenizer)
    try:
        parts, user = prompt_parts(config, form, prompt)
        ids = renderer.prompt_ids(renderer.prompt(parts, user))
    except RowError as error:
        raise UserError(str(error), where="prompt") from error
    return not_empty(ids)


def render_row(config: DataConfig, tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], str]:
    """The same for a row of a training file without its answer.

    Args:
        config: the data options of the run; of several sets the first one's.
        tokenizer: the run's tokenizer.
        row: its columns; a conversation ends with the turn to answer.

    Returns:
        the token ids, and the row's text for the instruction prior.

    Raises:
        UserError: the row has not the columns that prompts of this run are made of, or its prompt is empty.
    """
    config = first_source(config)
    form = form_of(config)
    if form not in CONVERSATIONS:
        turns = {name: FORMS[name].required[0] for name in CONVERSATIONS}
        form = next((name for name, field in turns.items() if config.columns.get(field, field) in row), form)
    columns = prompt_columns(config, form)
    missing = [name for name in columns if name not in row]
    if isinstance(row.get("prompt"), str) and len(missing) == len(columns):
        # Beside other columns that mean nothing to this run.
        instruction = row.get("instruction") or (row["prompt"] if config.instruction == "user" else "")
        return render_prompt(config, tokenizer, row["prompt"], form=form), str(instruction)
    if missing:
        raise UserError(
            f"there is no {' and no '.join(missing)}, which this run's prompts are made of",
            where="prompt",
            fix=f"give {', '.join(columns)}{'' if 'prompt' in columns else ', or a prompt'}; "
            f"the row has {', '.join(map(str, row)) or 'no column'}",
        )
    try:
        if form == "text":
            # The beginning of a text, to be continued.
            return render_prompt(config, tokenizer, as_text(row[columns[0]], f"column '{columns[0]}'"), form=form), ""
        example = unanswered(config, form, row)
    except RowError as error:
        raise UserError(str(error), where="prompt") from error
    renderer = Renderer(config, form, tokenizer)
    return not_empty(renderer.prompt_ids(renderer.prompt_of(example))), example.instruction


def prompt_columns(config: DataConfig, form: str) -> list[str]:
    """Names of columns that prompts of this form are made of."""
    text_template = template(config.prompt_template, "data.prompt_template")
    if text_template is not None:
        used = list(text_template.fields)
    else:
        required = FORMS[form].required
        used = [name for name in required if name != FORMS[form].completion_field] or list(required)
    return [config.columns.get(name, name) for name in used]


def unanswered(config: DataConfig, form: str, row: Mapping[str, Any]) -> Example:
    """A row without an answer as an example; what stands for the answer is of no account.

    Raises:
        RowError: it cannot be used.
        UserError: it lacks a column.
    """
    columns = {field: column for field, column in config.columns.items() if column in row}
    fields = dict(row)
    if form in CONVERSATIONS:
        (field,) = FORMS[form].required
        column = columns.get(field, field)
        turns = row.get(column)
        speaker, text = ("from", "value") if form == "sharegpt" else ("role", "content")
        answer = {speaker: "gpt" if form == "sharegpt" else "assistant", text: ANSWER}
        if isinstance(turns, list):
            last = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
            if not turns or last.get(speaker) in ("assistant", "gpt", "model"):
                raise RowError("the conversation must end with a turn to answer")
            fields[column] = [*turns, answer]
    else:
        field = FORMS[form].completion_field or "completion"
        fields[columns.get(field, field)] = ANSWER
    asks_column = config.instruction == "column" and columns.get("instruction", "instruction") not in row
    own = replace(
        config,
        format=cast(Any, form),
        columns=columns,
        completion_template=None,
        remove_pattern=None,
        group_by=None,
        instruction="none" if asks_column else config.instruction,
    )
    made = RawRow(fields, "prompt", 1)
    return ExampleMaker(own, [made]).example(made)


def form_of(config: DataConfig) -> str:
    """Name of the row form of a run: what its config says, and for auto what its training rows have."""
    return config.format if config.format != "auto" else form_of_training_rows(config)


def not_empty(ids: list[int]) -> list[int]:
    """The tokens of a prompt.

    Raises:
        UserError: there are none.
    """
    if not ids:
        raise UserError("the prompt is empty", where="prompt", fix="write at least one character")
    return ids


def prompt_parts(config: DataConfig, form: str, prompt: str) -> tuple[TextParts, str]:
    """A prompt dressed for plain rendering, and bare for a chat."""
    text_template = template(config.prompt_template, "data.prompt_template")
    if text_template is not None and form not in CONVERSATIONS:
        fields = text_template.fields
        if len(fields) > 1:
            raise UserError(
                f"the prompt template has several fields ({', '.join(fields)}) and the prompt is one text",
                where="data.prompt_template",
                fix="give rows of a file with these columns (--file prompts.jsonl)",
            )
        text_template.check(fields)
        parts = text_template.render(lambda name: prompt)
        return parts, "".join(text for _, text in parts)
    return ((False, alpaca_prompt(prompt) if form == "alpaca" else prompt),), prompt


def form_of_training_rows(config: DataConfig, look_at: int = 64) -> str:
    """The form of the training rows (of several sets the first one's), from the first of them if they are at hand, else
    ``prompt_completion``."""
    config = first_source(config)
    try:
        if config.path.startswith(GENERATED):
            rows = generated_rows(config.path)[0][:look_at]
        elif Path(config.path).expanduser().exists():
            found = read_rows(config.path, split=config.split)
            rows = [row for row in islice(found, look_at) if isinstance(row, RawRow)]
        else:
            return "prompt_completion"
        return ExampleMaker(config, rows).form.name if rows else "prompt_completion"
    except UserError:
        return "prompt_completion"
