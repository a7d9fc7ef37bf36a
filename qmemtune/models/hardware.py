"""Which device a run uses, and in which data type it computes there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from qmemtune.errors import UserError
from qmemtune.models.threads import torch_threads

CPU_WORDS = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
"""How torch's and the system's allocators say on a CPU that there is no more."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Data types by their names in configs."""

CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
"""Processor features that make bfloat16 products fast, as torch names them; each may be absent."""


def pick_device() -> torch.device:
    """This process's GPU if there is one (``LOCAL_RANK`` says which under a launcher), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is at least as fast as float32 on ``device``; found out once a process."""
    if device.type == "cuda":
        # Emulated bfloat16 (before Ampere) counts as supported by default; it is slower than float32.
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return _cpu_bf16_is_fast()


@lru_cache(maxsize=1)
def _cpu_bf16_is_fast() -> bool:
    # Two runs of one recipe must not compute in different types because the machine was busy once. So the flags come
    # first, for machines without the instructions; and what is measured is one thread's own processor time, since
    # several threads wait for each other wherever another process holds one of their cores.
    features = torch.cpu.get_capabilities()
    if not any(features.get(flag, False) for flag in CPU_BF16_FLAGS):
        return False
    with torch_threads(1):
        own_time = {dtype: matmul_seconds(dtype, clock=time.thread_time) for dtype in (torch.bfloat16, torch.float32)}
    return own_time[torch.bfloat16] <= own_time[torch.float32]


def matmul_seconds(
    dtype: torch.dtype, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Best of five products the size of a small model's projection, in seconds; some milliseconds in all."""
    left = torch.ones(256, 1024, dtype=dtype, device=device)
    right = torch.ones(1024, 1024, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(6):  # the first one warms up; the best of all leaves it out by itself
        start = clock()
        torch.mm(left, right)
        if left.is_cuda:
            torch.cuda.synchronize(device)
        best = min(best, clock() - start)
    return best


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The data type of the arithmetic on ``device``.

    Args:
        setting: ``model.compute_dtype``; ``auto`` is bfloat16 where :func:`bf16_is_fast`, else float32.

    Raises:
        UserError: float16 on a CPU, or no such type.
    """
    if setting == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    if setting not in DTYPES:
        raise UserError(
            f"unknown data type {setting!r}", where="model.compute_dtype", fix=f"one of: auto, {', '.join(DTYPES)}"
        )
    if setting == "float16" and device.type == "cpu":
        raise UserError(
            "float16 trains on GPUs only: it needs loss scaling, which the CPU does not have",
            where="model.compute_dtype",
            fix="use auto, float32 or bfloat16",
        )
    return DTYPES[setting]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision for ``dtype`` on ``device``; a context that does nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in CPU_WORDS)
