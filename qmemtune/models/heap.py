"""Giving memory that glibc's allocator keeps back to the system.

Freed tensors below 32 MiB stay with the process, in holes that tensors of other shapes do not fit into: each batch of
another length then takes fresh memory on top of what earlier ones left behind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the allocator is glibc's; nothing happens elsewhere.

    Some milliseconds, and the next step pays for its pages anew: for pauses between steps, not for each of them.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
