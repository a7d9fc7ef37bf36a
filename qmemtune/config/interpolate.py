"""``${a.b}`` in a YAML value stands for the value of the key ``a.b``; nothing else is looked up."""

from __future__ import annotations

import re

_REFERENCE = re.compile(r"(?P<escaped>\\\$\{)|\$\{(?P<key>[A-Za-z_]\w*(?:\.[\w-]+)*)\}")


def references(text: str) -> list[str]:
    """Keys that the text refers to."""
    return [match["key"] for match in _REFERENCE.finditer(text) if match["key"]]


def is_plain_reference(text: str) -> bool:
    """Whether the text is one reference and nothing else: then it takes over the value with its type."""
    match = _REFERENCE.fullmatch(text)
    return bool(match and match["key"])


def problem_with(text: str) -> str | None:
    """What is wrong with the ``${...}`` in a text, if anything."""
    rest = _REFERENCE.sub("", text)
    if "${" not in rest:
        return None
    found = rest[rest.index("${") :][:40]
    return f"{found!r} is no reference to a key (resolvers such as oc.env are switched off)"


FIX = "write ${section.key}, or \\${ for the two characters themselves"


def substitute(text: str, values: dict[str, str]) -> str:
    """The text with each reference replaced by its value and ``\\${`` by ``${``."""
    return _REFERENCE.sub(lambda match: "${" if match["escaped"] else values[match["key"]], text)


def escape(text: str) -> str:
    """The text written such that it reads back as itself."""
    return text.replace("${", "\\${")
