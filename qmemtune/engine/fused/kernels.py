"""Triton kernels of what lies between the matrix products of a training step on an NVIDIA GPU.

Each reads its inputs once and writes its results once; as torch's elementwise operations they are three to twenty
kernels. Arithmetic is in float32, rounded where transformers' own layers round.

Imported where a tensor on a GPU needs one of them, and nowhere else: Triton is not installed with torch's CPU builds.

Letters: N tokens, D width, V words, B rows, H heads, T tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""That one program of an elementwise kernel is given."""
WORDS = 8192
"""Logits that one program holds at a time."""


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def _on(device: torch.device) -> Any:
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(device)


@triton.jit
def _rms_norm(x, weight, y, scale, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(scale + row, inverse)
    normed = (value * inverse).to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (normed * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, weight, scale, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    normed = (value * tl.load(scale + row)).to(y.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (normed * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(grad, x, weight, scale, result, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    inverse = tl.load(scale + row)
    normed = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32) * inverse
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32) * factor
    along = tl.sum(incoming * normed, axis=0) / width
    outgoing = (incoming - normed * along) * inverse
    tl.store(result + row * width + column, outgoing.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate, up, result, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    kind = result.dtype.element_ty
    opening = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    opened = (opening * tl.sigmoid(opening)).to(kind).to(tl.float32)
    passed = opened * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + place, passed.to(kind), mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    kind = grad_gate.dtype.element_ty
    opening = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    passed = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(opening)
    opened = (opening * share).to(kind).to(tl.float32)
    tl.store(grad_up + place, (incoming * opened).to(kind), mask=inside)
    slope = share * (1.0 + opening * (1.0 - share))
    tl.store(grad_gate + place, (incoming * passed * slope).to(kind), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _rotated(  # type: ignore[no-untyped-def]
    x, cos, sin, result, tokens, heads, half,
    x_row, x_head, x_token, cos_row, cos_token, result_row, result_head, result_token,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, token = program // tokens, program % tokens
    column = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)
    here = column < half
    inside = (head < heads)[:, None] & here[None, :]
    angle = row * cos_row + token * cos_token + column
    first_cos = tl.load(cos + angle, mask=here, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + angle + half, mask=here, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + angle + half, mask=here, other=0.0).to(tl.float32)[None, :]
    place = row * x_row + token * x_token + head[:, None] * x_head + column[None, :]
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        made_first = first * first_cos + second * second_sin
        made_second = second * second_cos - first * first_sin
    else:
        made_first = first * first_cos - second * first_sin
        made_second = second * second_cos + first * second_sin
    kind = result.dtype.element_ty
    target = row * result_row + token * result_token + head[:, None] * result_head + column[None, :]
    tl.store(result + target, made_first.to(kind), mask=inside)
    tl.store(result + target + half, made_second.to(kind), mask=inside)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, losses, stride, words: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    target = tl.load(targets + row)
    # A target that is no word makes a loss that is no number.
    own = tl.load(line + target, mask=(target >= 0) & (target < words), other=float("nan")).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        value = tl.load(line + word, mask=word < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(value, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher), axis=0)
        highest = higher
    tl.store(losses + row, tl.log(total) + highest - own)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        value = tl.load(line + word, mask=word < words, other=float("-inf")).to(tl.float32)
        share = tl.exp(value - highest) / total - tl.where(word == target, 1.0, 0.0)
        tl.store(line + word, share.to(logits.dtype.element_ty), mask=word < words)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``weight * (x / rms(x))``, rounded to x's type before the weight, and ``1 / rms(x)``.

    Shapes: x (..., D), weight (D,), both of one type; results (..., D) and (..., 1), the latter float32.
    """
    x = x.contiguous()
    width = x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    with _on(x.device):
        _rms_norm[(scale.numel(),)](x, weight, y, scale, width, eps, BLOCK=block, num_warps=_warps(block))
    return y, scale


def normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The first result of :func:`rms_norm` once more, of its second."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    with _on(x.device):
        _normed[(scale.numel(),)](x, weight, scale, y, width, BLOCK=block, num_warps=_warps(block))
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of :func:`rms_norm` with respect to x, (..., D); ``scale`` is its second result."""
    x, grad = x.contiguous(), grad.contiguous()
    width = x.shape[-1]
    result = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    with _on(x.device):
        _rms_norm_backward[(scale.numel(),)](
            grad, x, weight, scale, result, width, BLOCK=block, num_warps=_warps(block)
        )
    return result


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, all of one shape and type."""
    gate, up = gate.contiguous(), up.contiguous()
    result, count = torch.empty_like(gate), gate.numel()
    with _on(gate.device):
        _gated[(triton.cdiv(count, ELEMENTS),)](gate, up, result, count, BLOCK=ELEMENTS)
    return result


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`gated` with respect to gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    with _on(gate.device):
        _gated_backward[(triton.cdiv(count, ELEMENTS),)](grad, gate, up, grad_gate, grad_up, count, BLOCK=ELEMENTS)
    return grad_gate, grad_up


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """``x * cos + (-x2, x1) * sin`` for x = (x1, x2), or the gradient of that for the gradient x.

    Shapes: x (B, H, T, D), of any order in memory but that D lies together; cos and sin (B or 1, 1, T, D). The result
    lies in the order (B, T, H, D), in which projections write and read.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    rows, heads, tokens, width = x.shape
    result = x.new_empty(rows, tokens, heads, width).transpose(1, 2)
    half = width // 2
    with _on(x.device):
        _rotated[(rows * tokens,)](
            x, cos, sin, result, tokens, heads, half,
            x.stride(0), x.stride(1), x.stride(2), 0 if len(cos) == 1 else cos.stride(0), cos.stride(2),
            result.stride(0), result.stride(1), result.stride(2),
            BACKWARD=backward, HALF=triton.next_power_of_2(half), HEADS=triton.next_power_of_2(heads),
        )  # fmt: skip
    return result


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses (N,), float32, of logits (N, V), whose place their gradients take.

    Args:
        logits: each row's words lie together.
        targets: (N,); the loss of one that is not below V is NaN.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    block = min(WORDS, triton.next_power_of_2(logits.shape[1]))
    with _on(logits.device):
        _cross_entropy[(len(logits),)](
            logits, targets, losses, logits.stride(0), words=logits.shape[1], BLOCK=block, num_warps=_warps(block)
        )
    return losses
