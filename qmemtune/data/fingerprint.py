"""Digests of rows, by which a run knows the ones that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from qmemtune.data.packing import PackedRows
from qmemtune.data.regression import TensorRows
from qmemtune.data.rows import TokenRows


def rows_digest(rows: Any) -> str | None:
    """SHA-256 of all that training and evaluation see of rows, in their order; where they come from does not count.

    None for rows of another kind.
    """
    if isinstance(rows, PackedRows):
        return rows_digest(rows.rows)
    digest = hashlib.sha256()
    if isinstance(rows, TokenRows):
        for part in rows.content():
            digest.update(part)
    elif isinstance(rows, TensorRows):
        for part in tensors(rows):
            digest.update(part)
    else:
        return None
    return digest.hexdigest()


def tensors(rows: TensorRows) -> Iterator[bytes]:
    for tensor in (rows.x, rows.y):
        yield repr((tuple(tensor.shape), tensor.dtype)).encode()
        yield tensor.contiguous().numpy().tobytes()
