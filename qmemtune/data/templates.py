"""Text templates: ``{field}`` is replaced by a row's column, ``{{`` and ``}}`` are literal braces.

No attributes, indices, conversions or format specifications: a template is text, so a column may have any name without
braces, and no template can reach into Python objects.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection

from qmemtune.errors import UserError

TextParts = tuple[tuple[bool, str], ...]
"""Text in parts: (written by the user in an option, so that special tokens in it are meant; the text)."""

TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def joined(parts: TextParts) -> str:
    return "".join(text for _, text in parts)


class TextTemplate:
    """A parsed template.

    Args:
        text: the template.
        key: the option that holds it, for messages.

    Raises:
        UserError: a brace has no partner, or a field no name.
    """

    def __init__(self, text: str, key: str) -> None:
        self.key = key
        self.parts: list[tuple[bool, str]] = []
        """(is a field, its name or the literal text), in order."""
        end = 0
        for match in TOKEN.finditer(text):
            self.parts.append((False, text[end : match.start()]))
            end = match.end()
            if match[0] in ("{{", "}}"):
                self.parts.append((False, match[0][0]))
            elif match[1] is None:
                raise UserError(
                    f"the brace '{match[0]}' at character {match.start() + 1} has no partner",
                    where=key,
                    fix=f"write '{match[0] * 2}' for a literal brace",
                )
            elif not match[1].strip():
                raise UserError("a field has no name: '{}'", where=key, fix="name a column, or write '{{}}'")
            else:
                self.parts.append((True, match[1].strip()))
        self.parts.append((False, text[end:]))

    @property
    def fields(self) -> list[str]:
        """Names of the fields, each once, in order."""
        return list(dict.fromkeys(part for is_field, part in self.parts if is_field))

    def render(self, value_of: Callable[[str], str]) -> TextParts:
        return tuple((not is_field, value_of(part) if is_field else part) for is_field, part in self.parts if part)

    def check(self, known: Collection[str]) -> None:
        """Raise UserError when a field is none of the ``known`` columns."""
        for name in self.fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                columns = f"the columns are {', '.join(sorted(known))}"
                raise UserError(
                    f"the template names '{name}', which no row has",
                    where=self.key,
                    fix=f"did you mean '{near[0]}'? {columns}" if near else columns,
                )
