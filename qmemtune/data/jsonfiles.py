"""Readers of .json and .jsonl files that know the line of every row.

Bytes that are not UTF-8 become surrogates here, so that only the row which holds them is rejected, not the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmemtune.data.files import open_bytes
from qmemtune.data.records import RawRow, Rejected, excerpt, kind_of
from qmemtune.errors import UserError

SPACE = re.compile(r"[ \t\r\n]*")
MALFORMED = "malformed JSON"
DUPLICATE_KEY = "a key is given twice"
WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def check_encoding(path: Path) -> None:
    """Raise UserError for a file in UTF-16 or UTF-32, of which no line could be read."""
    with open_bytes(path) as file:
        head = file.read(4)
    if head.startswith(WIDE_BOMS):
        raise UserError(
            "the file is in UTF-16 or UTF-32, not UTF-8",
            where=str(path),
            fix=f"convert it, for example: iconv -f UTF-16 -t UTF-8 {path.name}",
        )


class DuplicateKeyError(ValueError):
    """An object gives one key twice: which value counts cannot be known."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text's pairs.

    Raises:
        DuplicateKeyError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique)


def read_jsonl(path: Path) -> Iterator[RawRow | Rejected]:
    """Rows of a file with one JSON object a line; blank lines are passed over."""
    check_encoding(path)
    name = str(path)
    with open_bytes(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            line = raw.decode("utf-8", "surrogateescape").strip()
            if not line:
                continue
            try:
                value = DECODER.decode(line)
            except json.JSONDecodeError as error:
                yield Rejected(name, number, MALFORMED, f"{error.msg} at column {error.colno}", excerpt(line))
            except RecursionError:
                yield Rejected(name, number, MALFORMED, "nested too deeply", excerpt(line))
            except DuplicateKeyError as error:
                yield Rejected(name, number, DUPLICATE_KEY, f"'{error}'", excerpt(line))
            except ValueError as error:  # for one, an integer of thousands of digits
                yield Rejected(name, number, MALFORMED, str(error), excerpt(line))
            else:
                yield as_row(value, name, number)


def read_json(path: Path) -> Iterator[RawRow | Rejected]:
    """Rows of a JSON array, of an object with one list, or (JSON lines under another name) of one object a line.

    Raises:
        UserError: the document is not JSON: after a fault inside an array no later row could be trusted.
    """
    check_encoding(path)
    with open_bytes(path) as file:
        text = file.read().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    start = skip_space(text, 0)
    if start == len(text):
        return
    try:
        if text[start] == "[":
            yield from array_rows(text, start, path)
        elif is_json_lines(text[start:]):
            yield from read_jsonl(path)
        elif text[start] != "{":
            raise json.JSONDecodeError("Expecting an array or an object", text, start)
        else:
            yield from object_rows(text, start, path)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{MALFORMED}: {error.msg} (column {error.colno})",
            where=f"{path}:{error.lineno}",
            fix="mend the file, or store one row a line as .jsonl: then only bad lines are left out",
        ) from error
    except RecursionError as error:
        raise UserError(f"{MALFORMED}: nested too deeply", where=str(path), fix="mend the file") from error


def skip_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def is_json_lines(text: str) -> bool:
    """A first line that is closed, with something after it, is JSON lines; a printed object opens over lines."""
    first, _, rest = text.partition("\n")
    return first.rstrip().endswith("}") and bool(rest.strip())


def as_row(value: Any, file: str, line: int) -> RawRow | Rejected:
    if isinstance(value, dict):
        return RawRow(value, file, line)
    return Rejected(file, line, "not an object", f"the row is {kind_of(value)}", excerpt(value))


def array_rows(text: str, start: int, path: Path) -> Iterator[RawRow | Rejected]:
    """Elements of the array that opens at ``start``, one at a time, each with its line."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = skip_space(text, start + 1)
    if text[position : position + 1] == "]":
        end_of_document(text, position + 1)
        return
    while True:
        line += text.count("\n", counted, position)
        counted = position
        found: RawRow | Rejected | None = None
        try:
            value, end = DECODER.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except DuplicateKeyError as error:
            value, end = decoder.raw_decode(text, position)
            found = Rejected(str(path), line, DUPLICATE_KEY, f"'{error}'", excerpt(text[position:end]))
        except ValueError as error:
            raise json.JSONDecodeError(str(error), text, position) from error
        yield found or as_row(value, str(path), line)
        position = skip_space(text, end)
        mark = text[position : position + 1]
        if mark == "]":
            end_of_document(text, position + 1)
            return
        if mark != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = skip_space(text, position + 1)


def end_of_document(text: str, position: int) -> None:
    position = skip_space(text, position)
    if position < len(text):
        raise json.JSONDecodeError("Extra data after the array", text, position)


def object_rows(text: str, start: int, path: Path) -> Iterator[RawRow | Rejected]:
    """Rows of the one list in an object; an object that is itself a row is the only row."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError(str(error), text, start) from error
    lists = {key: span for key, span in list_spans(text, start).items() if isinstance(document.get(key), list)}
    if not lists or is_conversation(document[next(iter(lists))]):
        yield RawRow(document, str(path), 1)
        return
    if len(lists) > 1:
        raise UserError(
            f"the object holds {len(lists)} lists ({', '.join(lists)}); which one is the rows?",
            where=str(path),
            fix="store the rows as one array, or as one object a line in a .jsonl file",
        )
    opening, end = next(iter(lists.values()))
    yield from array_rows(text[:end], opening, path)


def list_spans(text: str, start: int) -> dict[str, tuple[int, int]]:
    """Where the lists of the (valid) object that opens at ``start`` begin and end, by key."""
    decoder = json.JSONDecoder()
    spans: dict[str, tuple[int, int]] = {}
    position = skip_space(text, start + 1)
    while text[position] == '"':
        key, position = decoder.raw_decode(text, position)
        opening = skip_space(text, skip_space(text, position) + 1)
        _, position = decoder.raw_decode(text, opening)
        if text[opening] == "[":
            spans[key] = (opening, position)
        position = skip_space(text, position)
        if text[position] == ",":
            position = skip_space(text, position + 1)
    return spans


def is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
