"""Data types and devices in the adapter's own arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
