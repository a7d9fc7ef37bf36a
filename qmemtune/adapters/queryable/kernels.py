"""Triton kernel of the routed product, for NVIDIA GPUs: low-rank states through their tokens' operators.

One launch in place of two casts and a batched product with a matrix a token, far below what cuBLAS is made for.
Imported where a tensor on a GPU needs it, and nowhere else: Triton is not installed with torch's CPU builds.

Letters: N tokens, L layers at one input, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Of operators that one program holds."""


@triton.jit(do_not_specialize=["count"])
def _routed(  # type: ignore[no-untyped-def]
    operators, states, result, count, stride, width,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1) * RANK
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    outer = tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK)
    there = (token < count)[:, None] & (outer < RANK)[None, :]
    square = there[:, :, None] & (inner < RANK)[None, None, :]
    place = token[:, None, None] * RANK * RANK
    if TRANSPOSED:
        place += inner[None, None, :] * RANK + outer[None, :, None]
    else:
        place += outer[None, :, None] * RANK + inner[None, None, :]
    operator = tl.load(operators + place, mask=square, other=0.0).to(tl.float32)
    along = (token < count)[:, None] & (inner < RANK)[None, :]
    state = tl.load(states + token[:, None] * stride + layer + inner[None, :], mask=along, other=0.0).to(tl.float32)
    made = tl.sum(operator * state[:, None, :], axis=2)
    tl.store(result + token[:, None] * width + layer + outer[None, :], made.to(result.dtype.element_ty), mask=there)


def routed(operators: Tensor, states: Tensor, *, transposed: bool = False) -> Tensor:
    """``C z`` for every token and layer, or ``C^T z``, in the type of z.

    Args:
        operators: C, (N, R, R), contiguous.
        states: z of L layers side by side, (N, L * R); a token's numbers lie together.
    """
    if states.stride(-1) != 1:
        states = states.contiguous()
    count, width = states.shape
    rank = operators.shape[-1]
    result = states.new_empty(count, width)
    block = triton.next_power_of_2(rank)
    tokens = max(ELEMENTS // block**2, 1)
    with torch.cuda.device(states.device):
        _routed[(triton.cdiv(count, tokens), width // rank)](
            operators, states, result, count, states.stride(0), width,
            TRANSPOSED=transposed, RANK=rank, BLOCK=block, TOKENS=tokens,
        )  # fmt: skip
    return result
