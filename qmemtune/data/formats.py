"""Row forms: one function each, from a row's columns to what was asked and what is to be answered.

To add a form, write a function here with ``@form`` above it; it is then recognised by its columns and can be named in
``data.format``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmemtune.data.records import RowError, is_unicode, kind_of

Message = dict[str, str]

ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class Parts:
    """What a form finds in a row. Texts are as in the row."""

    user: str = ""
    """What was asked, without dress: the user's turn when the row is put into a chat."""
    prompt: str = ""
    """The same dressed as the form does it for plain rendering."""
    completion: str = ""
    """What is to be answered."""
    instruction: str = ""
    """Text for the instruction prior."""
    system: str = ""
    """System prompt of the row."""
    messages: list[Message] = field(default_factory=list)
    """The whole conversation, for forms that are one."""
    muted: frozenset[int] = frozenset()
    """Indices of assistant messages that are not in the loss."""


class Fields:
    """A row's columns under the form's names, checked when asked for.

    Args:
        values: the row.
        columns: field of the form -> column that holds it.
        prompt: rendered prompt template, if there is one.
        completion: rendered completion template, if there is one.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        columns: Mapping[str, str],
        prompt: str | None = None,
        completion: str | None = None,
    ) -> None:
        self.values = values
        self.columns = columns
        self.prompt = prompt
        self.completion = completion

    def get(self, name: str) -> Any:
        return self.values.get(self.columns.get(name, name))

    def text(self, name: str) -> str:
        """The text of a field that a row must have.

        Raises:
            RowError: missing, null, empty, not text, or not valid Unicode.
        """
        column = self.columns.get(name, name)
        if column not in self.values:
            raise RowError(f"column '{column}' is missing", f"the row has {', '.join(map(str, self.values)) or 'none'}")
        text = as_text(self.values[column], f"column '{column}'")
        if not text.strip():
            raise RowError(f"column '{column}' is empty")
        return text

    def optional(self, name: str) -> str:
        """The text of a field that may be missing, null or empty; then ``""``."""
        value = self.get(name)
        return "" if value is None else as_text(value, f"column '{self.columns.get(name, name)}'")


def as_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind_of(value)}, not text")
    if not is_unicode(value):
        raise RowError(f"{what} is not valid Unicode text", "bytes that are not UTF-8, or a lone surrogate")
    return value


@dataclass(frozen=True)
class Form:
    """A row form and the columns that tell it."""

    name: str
    parse: Callable[[Fields], Parts]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    prompt_field: str | None
    """Field that a prompt template makes dispensable."""
    completion_field: str | None
    """Field that a completion template makes dispensable."""

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


FORMS: dict[str, Form] = {}


def form(
    *,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    prompt_field: str | None = None,
    completion_field: str | None = None,
) -> Callable[[Callable[[Fields], Parts]], Callable[[Fields], Parts]]:
    """Register the function below as the row form of its name."""

    def register(parse: Callable[[Fields], Parts]) -> Callable[[Fields], Parts]:
        name = parse.__name__
        FORMS[name] = Form(name, parse, required, optional, prompt_field, completion_field)
        return parse

    return register


@form(
    required=("prompt", "completion"),
    optional=("instruction", "system"),
    prompt_field="prompt",
    completion_field="completion",
)
def prompt_completion(row: Fields) -> Parts:
    """``prompt``, ``completion``; optionally ``instruction`` (for the instruction prior) and ``system``."""
    prompt = row.text("prompt") if row.prompt is None else row.prompt
    completion = row.text("completion") if row.completion is None else row.completion
    named = row.columns.get("prompt", "prompt")
    asked = row.values.get(named) if row.prompt is not None else prompt
    return Parts(
        user=prompt,
        prompt=prompt,
        completion=completion,
        instruction=row.optional("instruction") or (asked if isinstance(asked, str) else prompt),
        system=row.optional("system"),
    )


@form(
    required=("instruction", "output"),
    optional=("input", "system"),
    prompt_field="instruction",
    completion_field="output",
)
def alpaca(row: Fields) -> Parts:
    """``instruction``, ``output``; optionally ``input`` and ``system``. Dressed in the Stanford Alpaca prompts."""
    instruction = row.text("instruction") if row.prompt is None else row.optional("instruction") or row.prompt
    completion = row.text("output") if row.completion is None else row.completion
    if row.prompt is not None:
        return Parts(row.prompt, row.prompt, completion, instruction, row.optional("system"))
    extra = row.optional("input")
    return Parts(
        user=f"{instruction}\n\n{extra}" if extra.strip() else instruction,
        prompt=alpaca_prompt(instruction, extra),
        completion=completion,
        instruction=instruction,
        system=row.optional("system"),
    )


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """The Stanford Alpaca prompt, with or without an input."""
    template = ALPACA_WITH_INPUT if extra.strip() else ALPACA_PLAIN
    # One pass over the template's own fields: braces in the texts stay as they are.
    return template.format(instruction=instruction, input=extra)


@form(required=("messages",), optional=("instruction", "system"))
def messages(row: Fields) -> Parts:
    """``messages``: a list of ``{role, content}`` as OpenAI's chat format has it; every assistant turn is in the loss.

    An assistant message with ``weight: 0`` is context only. Turns after the last assistant message are left out.
    """
    column = row.columns.get("messages", "messages")
    if column not in row.values:
        raise RowError(f"column '{column}' is missing", f"the row has {', '.join(map(str, row.values)) or 'none'}")
    found = row.values[column]
    if not isinstance(found, list):
        raise RowError(f"column '{column}' is {kind_of(found)}, not a list of messages")
    conversation = [check_message(message, number) for number, message in enumerate(found, start=1)]
    answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant message")
    conversation = conversation[: answers[-1] + 1]
    turns = [message["content"] for message in conversation if message["role"] == "user"]
    if not turns:
        raise RowError("no user message before an answer")
    systems = [message["content"] for message in conversation if message["role"] in ("system", "developer")]
    return Parts(
        user=turns[0],
        completion=conversation[-1]["content"],
        instruction=turns[0],
        system=systems[0] if systems else row.optional("system"),
        messages=conversation,
        muted=frozenset(i for i in answers if found[i].get("weight") == 0),
    )


def check_message(message: object, number: int) -> Message:
    """One message as ``{role, content}`` with plain text.

    Raises:
        RowError: it is not that.
    """
    if not isinstance(message, dict):
        raise RowError("a message is not an object", f"message {number} is {kind_of(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"a message's role is none of {', '.join(ROLES)}", f"message {number}: {role!r:.40}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise RowError("tool calls are not supported", f"message {number}")
    content = message.get("content")
    if isinstance(content, list) and content and all(is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    try:
        text = as_text(content, "a message's content")
    except RowError as error:
        raise RowError(error.reason, f"message {number}") from None
    if role == "assistant" and not text.strip():
        raise RowError("an assistant message is empty", f"message {number}")
    return {"role": role, "content": text}


def is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
