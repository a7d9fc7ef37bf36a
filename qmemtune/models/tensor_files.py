"""Headers of safetensors files.

The format: eight bytes with the length of the header, the header (JSON: name -> dtype, shape, offsets), the values.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """Where a file holds one tensor."""

    name: str
    dtype: str
    """As the format names it, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the file's start."""
    end: int


def read_header(path: Path) -> tuple[dict[str, str], list[Entry]]:
    """A file's metadata, and its tensors in the order of the header.

    Raises:
        ValueError: not a whole safetensors file; says why.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if len(first) < 8:
            raise ValueError("it is shorter than the length of its header")
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    try:
        metadata = header.pop("__metadata__", {})
        entries = [
            Entry(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        ]
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"its header is not one of safetensors ({error})") from error
    if any(entry.end > size for entry in entries):
        raise ValueError("it ends before its last tensor")
    return metadata, entries
