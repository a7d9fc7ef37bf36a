"""Deterministic kernels only, for as long as a run wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.trainer_utils import enable_full_determinism

from qmemtune.errors import UserError


@contextmanager
def deterministic_kernels(wanted: bool, seed: int) -> Iterator[None]:
    """Let torch use deterministic kernels only while the block runs.

    To be entered before the first kernel of a process runs on a GPU: its libraries read their settings once.

    Args:
        wanted: otherwise nothing is done.
        seed: of torch, numpy and Python.

    Raises:
        UserError: an operation has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    enable_full_determinism(seed)
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise UserError(
            f"an operation has no deterministic kernel here: {str(error).split(',')[0]}",
            where="trainer.deterministic",
            fix="leave it off, or choose another model.attn_implementation or quantization",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
