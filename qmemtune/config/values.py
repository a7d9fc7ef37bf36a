"""From a text or a YAML value to a value of a field's type, with a plain reason where that is not possible."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qmemtune.config.fields import nearest

TRUE = {"true", "yes", "on"}
FALSE = {"false", "no", "off"}
NULL = {"null", "none"}
MAX_INT = 2**63 - 1
_NUMBER = re.compile(r"^[+-]?(\d[\d_]*)?\.?(\d[\d_]*)?([eE][+-]?\d{1,6})?$")


class BadValue(ValueError):
    """A value does not fit a field: what is wrong, and the way out."""

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix


def from_text(text: str, kind: Any) -> Any:
    """The value that ``text`` (the right side of an override) means for a field of type ``kind``.

    A text field takes it as it stands, with its quotes. Quotes around the whole are left out of the words "null" and
    "none", which mean no value without them, and of the empty text, "".

    Raises:
        BadValue: it means none.
    """
    inner, _ = _without_none(kind)
    if inner is str and _quoted(text) and _unquote(text).lower() not in NULL | {""}:
        return text
    return _part_from_text(text, kind)


def _part_from_text(text: str, kind: Any) -> Any:
    """The same inside a list or mapping, where quotes keep a text together and are no part of it."""
    inner, optional = _without_none(kind)
    if optional and not _quoted(text) and text.strip().lower() in NULL:
        return None
    if inner is str:
        return _unquote(text)
    text = _unquote(text.strip()).strip()
    origin = get_origin(inner)
    if origin is Literal:
        return _choice(text, get_args(inner))
    if origin is list:
        return _list_from_text(text, get_args(inner)[0])
    if origin is dict:
        return _dict_from_text(text, get_args(inner)[1])
    if inner is bool:
        return _bool(text)
    return _number(text, inner)


def from_yaml(value: Any, raw: Any, kind: Any) -> Any:
    """The value that a YAML value means for a field of type ``kind``; ``raw`` is how it was written.

    Raises:
        BadValue: it means none.
    """
    inner, optional = _without_none(kind)
    if value is None:
        if optional:
            return None
        raise BadValue(f"must be {describe(inner)}, not empty")
    origin = get_origin(inner)
    if inner is str:
        return _text(value, raw)
    if origin is Literal:
        written = raw if isinstance(raw, str) else value
        return _choice(str(written), get_args(inner))
    if origin is list:
        item = get_args(inner)[0]
        if not isinstance(value, list | tuple):
            if isinstance(value, dict):
                raise BadValue(f"must be {describe(inner)}, not a mapping")
            return [from_yaml(value, raw, item)]
        raws = raw if isinstance(raw, list) else [None] * len(value)
        return [from_yaml(part, part_raw, item) for part, part_raw in zip(value, raws, strict=True)]
    if origin is dict:
        if not isinstance(value, dict):
            raise BadValue(f"must be {describe(inner)}, not {value!r}")
        return {str(name): from_yaml(part, None, get_args(inner)[1]) for name, part in value.items()}
    if inner is bool:
        if isinstance(value, bool):
            return value
        raise BadValue(f"must be true or false, not {_brief(value)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue(f"must be {describe(inner)}, not {_brief(value)}")
    return _number(repr(value), inner)


def describe(kind: Any) -> str:
    """A type in words."""
    inner, optional = _without_none(kind)
    origin = get_origin(inner)
    if origin is Literal:
        words = "one of " + ", ".join(str(choice) for choice in get_args(inner))
    elif origin is list:
        words = f"a list of {_plural(get_args(inner)[0])}, such as [a, b]"
    elif origin is dict:
        words = "a mapping, such as {a: b}"
    else:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(inner, str(inner))
    return f"{words}, or null" if optional else words


def _plural(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return describe(kind).removeprefix("one of ")
    return {str: "texts", int: "whole numbers", float: "numbers"}.get(kind, str(kind))


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type without ``None``, and whether it had it."""
    if get_origin(kind) in (Union, UnionType):
        rest = [part for part in get_args(kind) if part is not NoneType]
        return rest[0], len(rest) < len(get_args(kind))
    return kind, False


def _quoted(text: str) -> bool:
    """Whether one pair of quotes holds the whole text."""
    text = text.strip()
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]


def _unquote(text: str) -> str:
    return text.strip()[1:-1] if _quoted(text) else text


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: Any, raw: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue(f"must be text, not {_brief(value)}", "put it in quotes if it is meant as text")
    return raw if isinstance(raw, str) else repr(value)


def _choice(text: str, choices: tuple[Any, ...]) -> str:
    if text in choices:
        return text
    close = nearest(text.lower(), [str(choice) for choice in choices])
    raise BadValue(
        f"{_brief(text)} is not one of {', '.join(str(choice) for choice in choices)}",
        f"did you mean {close[0]}?" if close else None,
    )


def _bool(text: str) -> bool:
    if text.lower() in TRUE | FALSE:
        return text.lower() in TRUE
    raise BadValue(f"must be true or false, not {_brief(text)}")


def _number(text: str, kind: Any) -> int | float:
    problem = BadValue(f"must be {describe(kind)}, not {_brief(text)}")
    if not _NUMBER.match(text):
        raise problem
    try:
        if kind is float:
            value = float(text.replace("_", ""))
            if not math.isfinite(value):
                raise problem
            return value
        exact = Decimal(text.replace("_", ""))
    except (ValueError, InvalidOperation):
        raise problem from None
    if abs(exact.adjusted()) > 20 and exact != 0:
        raise problem
    if exact != exact.to_integral_value() or abs(exact) > MAX_INT:
        raise problem
    return int(exact)


def _list_from_text(text: str, item: Any) -> list[Any]:
    if text.startswith("[") != text.endswith("]"):
        raise BadValue(f"a bracket is missing in {_brief(text)}", "write [a, b]")
    inside = text[1:-1] if text.startswith("[") else text
    parts = _split(inside, ",")
    if not inside.strip():
        return []
    return [_part_from_text(part.strip(), item) for part in parts]


def _dict_from_text(text: str, item: Any) -> dict[str, Any]:
    if not (text.startswith("{") and text.endswith("}")):
        raise BadValue(f"must be a mapping, not {_brief(text)}", "write {a: b}, or set one entry with +key.a=b")
    inside = text[1:-1]
    result: dict[str, Any] = {}
    for part in _split(inside, ",") if inside.strip() else []:
        name, colon, value = part.partition(":")
        if not colon or not name.strip():
            raise BadValue(f"{_brief(part.strip())} is not an entry", "write {a: b}")
        result[_unquote(name.strip())] = _part_from_text(value.strip(), item)
    return result


def _split(text: str, at: str) -> list[str]:
    """Split at a character that is outside quotes and brackets."""
    parts, quote, depth = [""], "", 0
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not parts[-1].strip():
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == at and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
