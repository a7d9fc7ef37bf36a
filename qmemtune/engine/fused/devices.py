"""Where layers have a fused form, and what it is made of there."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from qmemtune.adapters.queryable.devices import triton_kernels

FUSED = ("cpu", "cuda")
"""Types of devices on which there is one."""


def kernels_for(x: Tensor) -> ModuleType | None:
    """:mod:`qmemtune.engine.fused.kernels` for a tensor on a GPU; None elsewhere, and where Triton is missing."""
    return triton_kernels("qmemtune.engine.fused.kernels", x)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on a device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
