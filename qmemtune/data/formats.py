"""Row forms: one function each, from a row's columns to what was asked and what is to be answered.

To add a form, write a function here with ``@form`` above it; it is then recognised by its columns and can be named in
``data.format``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmemtune.data.conversations import Message, from_openai, from_sharegpt, tool_list
from qmemtune.data.records import RowError, as_text, is_blank, kind_of

ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


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
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the conversation may call."""


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
        if is_blank(text):
            raise RowError(f"column '{column}' is empty", "only invisible characters" if text.strip() else "")
        return text

    def list_of(self, name: str) -> list[Any]:
        """The messages of a field that a row must have.

        Raises:
            RowError: missing, or no list.
        """
        column = self.columns.get(name, name)
        if column not in self.values:
            raise RowError(f"column '{column}' is missing", f"the row has {', '.join(map(str, self.values)) or 'none'}")
        found = self.values[column]
        if not isinstance(found, list):
            raise RowError(f"column '{column}' is {kind_of(found)}, not a list of messages")
        return found

    def optional(self, name: str) -> str:
        """The text of a field that may be missing, null or empty; then ``""``."""
        value = self.get(name)
        return "" if value is None else as_text(value, f"column '{self.columns.get(name, name)}'")


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


@form(required=("messages",), optional=("instruction", "system", "tools"))
def messages(row: Fields) -> Parts:
    """``messages``: a list of ``{role, content}`` as OpenAI's chat format has it, tool calls included.

    Optionally ``tools``, the functions on offer. An assistant message with ``weight: 0`` is context only. Turns after
    the last assistant message are left out.
    """
    return conversation_parts(row, *from_openai(row.list_of("messages")))


@form(required=("conversations",), optional=("instruction", "system", "tools"))
def sharegpt(row: Fields) -> Parts:
    """``conversations``: a list of ``{from, value}``; human, gpt, system, function_call, observation, tool speak."""
    return conversation_parts(row, *from_sharegpt(row.list_of("conversations")))


def conversation_parts(row: Fields, conversation: list[Message], muted: frozenset[int]) -> Parts:
    """What a form that is a conversation finds."""
    turns = [message["content"] for message in conversation if message["role"] == "user"]
    systems = [message["content"] for message in conversation if message["role"] in ("system", "developer")]
    tools = row.get("tools")
    return Parts(
        user=turns[0],
        completion=conversation[-1]["content"],
        instruction=turns[0],
        system=systems[0] if systems else row.optional("system"),
        messages=conversation,
        muted=muted,
        tools=[] if tools is None else tool_list(tools),
    )


@form(required=("text",), completion_field="text")
def text(row: Fields) -> Parts:
    """``text``: plain text, all of it in the loss; what is over ``max_length`` goes on in further rows."""
    return Parts(completion=row.text("text") if row.completion is None else row.completion)
