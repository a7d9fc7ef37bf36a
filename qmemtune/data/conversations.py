"""Conversations as rows hold them: messages checked one by one, then the order of their roles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qmemtune.data.records import RowError, as_text, is_unicode, kind_of

Message = dict[str, Any]
"""``role`` and ``content`` (text); in tool use also ``tool_calls``, ``tool_call_id`` and ``name``; of an answer also
what was thought before it (:data:`THOUGHTS`)."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer under which data sets and chat templates have what was thought before it."""
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Speakers of ShareGPT rows, and the roles they play."""


def from_openai(found: Sequence[Any]) -> tuple[list[Message], frozenset[int]]:
    """``{role, content, ...}`` objects as a conversation that ends with its last answer.

    Returns:
        the messages, and the indices of answers that are not in the loss (``weight: 0``).

    Raises:
        RowError: a message cannot be used, or their order makes no sense.
    """
    return _whole(found, [check_message(message, number) for number, message in enumerate(found, start=1)])


def from_sharegpt(found: Sequence[Any]) -> tuple[list[Message], frozenset[int]]:
    """``{from, value}`` objects as a conversation; see :func:`from_openai`."""
    return _whole(found, [_sharegpt_message(message, number) for number, message in enumerate(found, start=1)])


def _whole(found: Sequence[Any], conversation: list[Message]) -> tuple[list[Message], frozenset[int]]:
    answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant message")
    conversation = conversation[: answers[-1] + 1]
    if not any(message["role"] == "user" for message in conversation):
        raise RowError("no user message before an answer")
    check_order(conversation)
    return conversation, frozenset(i for i in answers if _weight(found[i], i + 1) == 0)


def _weight(message: dict[str, Any], number: int) -> int:
    weight = message.get("weight")
    if weight is None:
        return 1
    if weight not in (0, 1) or isinstance(weight, str):
        raise RowError("a message's weight is neither 0 nor 1", f"message {number}: {weight!r:.40}")
    return int(weight)


def check_order(conversation: Sequence[Message]) -> None:
    """Raise RowError where no chat could have had this order of roles."""
    talk = False
    previous: Message = {"role": "", "content": ""}
    for number, message in enumerate(conversation, start=1):
        role, before = message["role"], previous["role"]
        wrong = ""
        if role in ("system", "developer"):
            wrong = "a system prompt after the start" if talk else ""
        elif role == "assistant":
            if not talk:
                wrong = "an answer before any question"
            elif before == "assistant" and not message.get("tool_calls"):
                wrong = "two answers in a row"
        elif role == "tool" and before != "tool" and not previous.get("tool_calls"):
            wrong = "a tool's result without a call"
        if wrong:
            raise RowError("the roles are out of order", f"message {number}: {wrong}")
        talk = talk or role not in ("system", "developer")
        previous = message


def check_message(message: object, number: int) -> Message:
    """One message in the OpenAI form, with plain text and its tool calls.

    Raises:
        RowError: it is not that.
    """
    if not isinstance(message, dict):
        raise RowError("a message is not an object", f"message {number} is {kind_of(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"a message's role is none of {', '.join(ROLES)}", f"message {number}: {role!r:.40}")
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [message["function_call"]]
    if not isinstance(calls, list):
        raise RowError("tool_calls is not a list", f"message {number} has {kind_of(calls)}")
    if calls and role != "assistant":
        raise RowError("a message that is no answer calls tools", f"message {number}")
    content = message.get("content")
    if isinstance(content, list) and content and all(is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""
    result: Message = {"role": role, "content": _text(content, number)}
    if role == "assistant" and not calls and not result["content"].strip():
        raise RowError("an assistant message is empty", f"message {number}")
    if calls:
        result["tool_calls"] = [tool_call(call, number) for call in calls]
    for key in THOUGHTS:
        if role == "assistant" and message.get(key) is not None:
            result[key] = _text(message[key], number, f"a message's {key}")
    for key in ("name", "tool_call_id"):
        if role == "tool" and isinstance(message.get(key), str) and is_unicode(message[key]):
            result[key] = message[key]
    return result


def _text(content: object, number: int, what: str = "a message's content") -> str:
    try:
        return as_text(content, what)
    except RowError as error:
        raise RowError(error.reason, f"message {number}") from None


def is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def tool_call(call: object, number: int) -> dict[str, Any]:
    """A call in the form that chat templates take: arguments as an object, not as JSON text.

    Raises:
        RowError: it names no function, or its arguments are no object.
    """
    if not isinstance(call, dict):
        raise RowError("a tool call is not an object", f"message {number} has {kind_of(call)}")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip() or not is_unicode(name):
        raise RowError("a tool call names no function", f"message {number}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise RowError("a tool call's arguments are not JSON", f"message {number}: {arguments[:40]!r}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError("a tool call's arguments are not an object", f"message {number}: {kind_of(arguments)}")
    check_texts(arguments, "a tool call", number)
    result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call.get("id"), str) and is_unicode(call["id"]):
        result["id"] = call["id"]
    return result


def check_texts(value: object, what: str, number: int) -> None:
    """Raise RowError for text inside nested JSON that is not valid Unicode, or for what is no JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{what} holds what JSON cannot", f"message {number}: {error}") from None
    if not is_unicode(text):
        raise RowError(f"{what} is not valid Unicode text", f"message {number}")


def tool_list(value: object) -> list[dict[str, Any]]:
    """The tools a row offers: a list of function schemas, or JSON text of one.

    Raises:
        RowError: it is not that.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("the tools are not JSON", str(value)[:60]) from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("the tools are not a list of objects", kind_of(value))
    check_texts(value, "a tool", 0)
    return value


def _sharegpt_message(message: object, number: int) -> Message:
    if not isinstance(message, dict):
        raise RowError("a message is not an object", f"message {number} is {kind_of(message)}")
    speaker = message.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowError(f"a speaker is none of {', '.join(SHAREGPT_ROLES)}", f"message {number}: {speaker!r:.40}")
    given = {"role": SHAREGPT_ROLES[speaker], "content": message.get("value")}
    if speaker == "function_call":
        text = _text(message.get("value"), number)
        try:
            calls = json.loads(text)
        except (ValueError, RecursionError):
            raise RowError("a function_call is not JSON", f"message {number}: {text[:40]!r}") from None
        given.update(content=None, tool_calls=calls if isinstance(calls, list) else [calls])
        if not given["tool_calls"]:
            raise RowError("a tool call names no function", f"message {number}")
    return check_message(given, number)
