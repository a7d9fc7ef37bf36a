"""Data types and devices in the adapter's own arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def float32(parameter: Tensor, like: Tensor) -> Tensor:
    """The parameter in float32 where ``like`` is: a model may be spread over several devices."""
    return parameter.to(device=like.device, dtype=torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off, on devices that know it (meta tensors do not); free where it is off."""
    # Not torch.amp.is_autocast_available, which torch 2.11 cannot compile.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def triton_kernels(name: str, x: Tensor) -> ModuleType | None:
    """The module of this name, of Triton kernels, for a tensor on a GPU; None elsewhere, and without Triton."""
    if not x.is_cuda:
        return None
    from torch.utils._triton import has_triton

    return import_module(name) if has_triton() else None
