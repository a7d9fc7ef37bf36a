"""Tensors that leave a place behind which the next one of their size fits into.

torch takes a CPU tensor from ``posix_memalign``, and glibc serves that from a free chunk only where the chunk is larger
than asked for, by the alignment and a header (``_mid_memalign`` in malloc/malloc.c; the sum is 96 bytes). So the place
of a freed tensor is too small for another one of the same size. Tensors below the threshold for mappings, which grows
to 32 MB, then leave a hole with each layer that is run: a step of SmolLM2-135M in float32, 8 rows of 384 tokens, kept
2.1 GB and took 3.2. With a little room behind the tensors that a layer lets go of it takes 2.4, and no step longer.

The room has two sizes, so that the place of a tensor that goes first takes one that goes later, and that one's place
takes one without any room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HANDED_ON = 128
"""Bytes of room behind a layer's result, which the model may let go of before the layers behind it."""
PASSING = 256
"""Bytes of room behind what a layer itself lets go of."""


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype, room: int) -> Tensor:
    """An uninitialised contiguous tensor with ``room`` bytes behind it.

    Args:
        like: where it is on a GPU, whose allocator hands out whole blocks, there is no room; where it is a tensor
            without numbers, so is the result.
    """
    if type(like) is not Tensor or like.is_cuda:
        return like.new_empty(shape, dtype=dtype)
    storage = torch.empty(torch.Size(shape).numel() * dtype.itemsize + room, dtype=torch.uint8).untyped_storage()
    # No view: a result of a layer may be added to in place, which autograd forbids for a view made without gradients.
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def passing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of the shape of ``like``, and of its type if none is given, for a layer's own
    use."""
    return empty(like, like.shape, dtype or like.dtype, PASSING)


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a type, for a layer's own use."""
    return passing(x, dtype).copy_(x)
