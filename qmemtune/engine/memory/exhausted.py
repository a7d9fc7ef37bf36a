"""What to say when memory does run out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qmemtune.engine.memory.fit import Memory, largest_part, size, suggestions
from qmemtune.errors import UserError
from qmemtune.models.hardware import is_out_of_memory

ASKED = re.compile(r"(?:[Tt]ried to allocate|you tried to allocate) ([\d.]+) ?(bytes|KiB|MiB|GiB)?")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, None: 1}
LESS = 0.8
"""Settings that are advised take at most so much of the estimate that was too low."""


def asked_bytes(error: BaseException) -> float | None:
    """What the allocator was asked for when it gave up, if it says so."""
    found = ASKED.search(str(error))
    return float(found[1]) * UNITS[found[2]] if found else None


@contextmanager
def memory_errors_explained(known: Memory | None, limit: Callable[[], float]) -> Iterator[None]:
    """Turn an allocator's failure inside into one message that says what fits.

    Args:
        known: estimates for the run and its largest batch, if they could be made.
        limit: bytes that a process can have on the device.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        # Frames of the failed step hold what it had allocated.
        error.__traceback__ = None
        raise explained(error, known, limit) from None


def explained(error: BaseException, known: Memory | None, limit: Callable[[], float]) -> UserError:
    """The message: what was estimated, what was asked for, and two settings that would fit."""
    asked = asked_bytes(error)
    problem = "memory ran out" + (f" when {size(asked)} more were asked for" if asked is not None else "")
    fix = "lower trainer.per_device_train_batch_size, or set trainer.gradient_checkpointing=true"
    where = "training"
    if known is not None:
        memory, workload = known.run, known.workload
        try:
            estimate = known.estimate
            problem += f"; the run was estimated at {size(estimate.total)} (most of it {largest_part(estimate)})"
            ways = suggestions(memory, workload, min(limit(), LESS * estimate.total))
        except MemoryError:
            ways = []
        if ways:
            fix = "these would fit: " + ", or ".join(str(way) for way in ways)
        where = f"a batch of {workload.rows} rows of up to {workload.tokens} tokens"
    return UserError(problem, where=where, fix=fix)
