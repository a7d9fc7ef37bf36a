"""Readers of .csv, .tsv, .parquet and .arrow files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmemtune.data.files import FAULTS, kind_of_file, open_bytes
from qmemtune.data.jsonfiles import check_encoding
from qmemtune.data.records import RawRow, Rejected, excerpt
from qmemtune.errors import UserError, first_line

PARQUET_ROWS = 1024
LONGEST_FIELD = 2**31 - 1
"""Characters; csv's own limit of 128 Ki would refuse long texts."""


def read_csv(path: Path) -> Iterator[RawRow | Rejected]:
    """Rows of a file with a header line; what separates columns is told by the header, and in a .tsv is a tab.

    A quote that is never closed takes in every later line: that is an error of the file, not of one row.

    Raises:
        UserError: no usable header, or a quote that is never closed.
    """
    check_encoding(path)
    name = str(path)
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with io.TextIOWrapper(open_bytes(path), newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            delimiter = "\t" if kind_of_file(path) == ".tsv" else guess_delimiter(file.readline())
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if "unexpected end of data" in str(error):
                        raise UserError(
                            "a quote opened here is never closed, so the rest of the file is one field",
                            where=f"{name}:{line}",
                            fix='close the quote, or double it ("") where it is part of the text',
                        ) from error
                    if header is None:
                        raise UserError(
                            f"the header cannot be read: {error}", where=f"{name}:{line}", fix="mend the quotes"
                        ) from error
                    yield Rejected(name, line, "malformed CSV", str(error))
                    continue
                if not values:
                    continue
                if header is None:
                    header = checked_header(values, name)
                elif len(values) != len(header):
                    detail = f"{len(values)} fields, the header has {len(header)}"
                    yield Rejected(name, line, "malformed CSV: wrong number of fields", detail, excerpt(values))
                else:
                    yield RawRow(dict(zip(header, values, strict=True)), name, line)
    finally:
        csv.field_size_limit(limit)


def guess_delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def checked_header(names: list[str], file: str) -> list[str]:
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the header names columns twice: {', '.join(twice)}", where=f"{file}:1", fix="rename one")
    return names


def read_parquet(path: Path) -> Iterator[RawRow | Rejected]:
    """Rows of a parquet file; the line is the row's number.

    Raises:
        UserError: the file cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with open_bytes(path) as stream, parquet.ParquetFile(pa.PythonFile(stream)) as file:
            yield from file.iter_batches(batch_size=PARQUET_ROWS)

    return rows_of(batches(), path, "parquet")


def read_arrow(path: Path) -> Iterator[RawRow | Rejected]:
    """Rows of an arrow (feather) file or stream; the line is the row's number.

    Raises:
        UserError: the file cannot be read.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with open_bytes(path) as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            source = pa.PythonFile(stream)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            if is_file:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from reader

    return rows_of(batches(), path, "arrow")


def rows_of(batches: Iterator[Any], path: Path, kind: str) -> Iterator[RawRow | Rejected]:
    """Rows of arrow batches, numbered from 1."""
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for row in batch_rows(batch):
                number += 1
                if row is None:
                    yield Rejected(str(path), number, "not valid Unicode text", "bytes that are not UTF-8")
                else:
                    yield RawRow(row, str(path), number)
    except (pa.lib.ArrowException, *FAULTS) as error:
        raise UserError(
            f"not a readable {kind} file: {first_line(error)}",
            where=str(path) if number == 0 else f"{path}:{number + 1}",
            fix="write or download the file again",
        ) from error


def batch_rows(batch: Any) -> list[dict[str, Any] | None]:
    """Rows of an arrow batch as dicts; None for a row whose text is not UTF-8."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in batch_rows(batch.slice(i, 1))]
