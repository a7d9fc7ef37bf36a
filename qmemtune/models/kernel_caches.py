"""How many kernels torch keeps for products of other shapes.

For bfloat16 products on a CPU, oneDNN makes a kernel for each shape, and keeps those of the last 1,024; torch keeps as
many of what it asked for. Every batch with another number of tokens has shapes of its own: a training step of
SmolLM2-135M over 8 rows has 57, of 0.85 MB each, and by its twentieth step a run keeps 0.9 GB that it will hardly use
again. What counts is that the shapes of one step are there in each of its layers: some 30, and 3 or 6 more a row.
"""

from __future__ import annotations

import os

CAPACITY = "256"
OF_A_BATCH = 60
"""Shapes of one batch, about."""
KERNEL_BYTES = 850_000
"""What one of them takes, on the mean over a step of SmolLM2-135M on an AVX-512 processor; 0.6 MB of it is a product of
any size."""
WITHOUT_A_BOUND = 1024
"""What either cache holds where its variable is not set."""
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's and torch's; both are read when the first kernel is made."""


def keep_fewer_kernels() -> None:
    """Bound both caches, for this process and those it starts; a variable that is set stays as it is.

    It has no effect after the first product in bfloat16.
    """
    for name in VARIABLES:
        os.environ.setdefault(name, CAPACITY)


def kept_bytes(*, other_shapes: bool) -> int:
    """What the kernels of a run take in the end.

    Args:
        other_shapes: whether batches have shapes of their own.
    """
    given = [os.environ.get(name, "") for name in VARIABLES]
    # A kernel is there for as long as either of them keeps it.
    kernels = max(int(text) if text.isdecimal() else WITHOUT_A_BOUND for text in given)
    return KERNEL_BYTES * (kernels if other_shapes else min(kernels, OF_A_BATCH))
