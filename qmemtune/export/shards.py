"""Safetensors files read and written piece by piece: never a whole tensor in memory, let alone a whole file."""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmemtune.errors import RunFailed, UserError
from qmemtune.models.tensor_files import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 24
"""Bytes read back at once."""
AHEAD = 1 << 27
"""Bytes that the disk reads ahead."""
FLUSH = 1 << 27
"""Bytes after which writing to the disk is begun: else all of a file would wait for its end."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the file's start."""
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    metadata: dict[str, str]
    tensors: list[Stored]
    """In the order of their values."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Planned:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]
    """Makes the values, in order, as contiguous tensors on the CPU."""

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def read_shard(path: Path) -> Shard:
    """Read a file's header.

    Raises:
        UserError: not a whole safetensors file, or one with a data type that cannot be merged into.
    """
    try:
        metadata, entries = read_header(path)
    except ValueError as error:
        raise UserError(f"not a whole safetensors file: {error}", where=str(path), fix="is the copy whole?") from error
    unknown = sorted({entry.dtype for entry in entries} - DTYPES.keys())
    if unknown:
        raise UserError(f"a data type that cannot be merged into: {unknown[0]}", where=str(path))
    tensors = [Stored(entry.name, DTYPES[entry.dtype], entry.shape, entry.begin, entry.end) for entry in entries]
    return Shard(path, metadata, sorted(tensors, key=lambda tensor: tensor.begin))


class MappedShard:
    """A file's tensors as views of the file itself: their pages belong to the file, not to the process."""

    def __init__(self, shard: Shard) -> None:
        with shard.path.open("rb") as file:
            # Private and writable, so that torch takes it without a warning; nobody writes.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._map.madvise(mmap.MADV_SEQUENTIAL)
        self._tensors = {tensor.name: tensor for tensor in shard.tensors}
        self._fetched = 0

    def view(self, name: str) -> Tensor:
        """A tensor as the file holds it. It must not be changed."""
        stored = self._tensors[name]
        count = prod(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        self._fetch(stored.begin, stored.end + AHEAD)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=stored.end - stored.begin, offset=stored.begin)
        # A file may begin a tensor at any byte.
        return aligned(raw, stored.dtype).view(stored.shape)

    def _fetch(self, begin: int, end: int) -> None:
        """Have the disk read what is needed now and next, while what is there is worked on."""
        begin = max(begin, self._fetched) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(end, len(self._map))
        if end > begin and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)
            self._fetched = end


def aligned(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as values; copied if they do not lie where such values must."""
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def write_shard(path: Path, metadata: dict[str, str], tensors: Sequence[Planned]) -> dict[str, int]:
    """Write a file and wait until it is on the disk.

    A second thread writes and sums up one piece while the next is made.

    Returns:
        CRC-32 of each tensor's values.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    sums: dict[str, int] = {}
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as flusher:
        file.write(struct.pack("<Q", len(header)) + header)

        flushing: Future[None] | None = None
        waiting = 0

        def write(name: str, piece: Tensor) -> None:
            nonlocal flushing, waiting
            values: Any = piece.reshape(-1).view(torch.uint8).numpy()
            sums[name] = zlib.crc32(values, sums.get(name, 0))
            write_all(file, values)
            waiting += values.nbytes
            if waiting >= FLUSH and (flushing is None or flushing.done()):
                flushing, waiting = flusher.submit(os.fsync, file.fileno()), 0

        pending: Future[None] | None = None
        for tensor in tensors:
            sums[tensor.name] = 0
            for piece in tensor.pieces():
                if pending is not None:
                    pending.result()
                pending = writer.submit(write, tensor.name, piece)
        if pending is not None:
            pending.result()
        os.fsync(file.fileno())
    return sums


def write_all(file: RawIOBase, values: Any) -> None:
    """Write all bytes: an unbuffered file may take fewer at a time."""
    left = memoryview(values)
    while left:
        left = left[file.write(left) :]


def verify_shard(path: Path, tensors: Iterable[Planned], sums: dict[str, int]) -> None:
    """Read a written file back from the disk and compare it with what was to be written.

    Raises:
        RunFailed: a name, shape, data type or value differs.
    """
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    try:
        shard = read_shard(path)
    except UserError as error:
        raise RunFailed(f"the written file is damaged: {error.findings[0].problem}", where=str(path)) from error
    if {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors} != planned:
        raise RunFailed("the written file does not hold the planned tensors", where=str(path))
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            # Else the check would read what is still in memory, not what is on the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for tensor in shard.tensors:
            file.seek(tensor.begin)
            found, left = 0, tensor.end - tensor.begin
            while left:
                piece = file.read(min(PIECE, left))
                if not piece:
                    break
                found, left = zlib.crc32(piece, found), left - len(piece)
            if left or found != sums[tensor.name]:
                raise RunFailed(
                    f"{tensor.name} was not written as it was computed",
                    where=str(path),
                    fix="is the disk healthy? try another export.path",
                )
