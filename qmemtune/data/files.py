"""Files as streams of bytes, whether they are compressed or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

GZIP = ".gz"
FAULTS = (OSError, EOFError, zlib.error)
"""What reading may raise: the file system's errors, and a compressed stream that is cut off or damaged."""


def kind_of_file(path: Path) -> str:
    """The ending that says how a file is written, in lower case and without that of compression."""
    inner = path.with_suffix("") if path.suffix.lower() == GZIP else path
    return inner.suffix.lower()


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; what ends in .gz is decompressed on the way."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == GZIP else path.open("rb")
