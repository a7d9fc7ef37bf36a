"""Whether a run fits into memory, and which settings would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from qmemtune.config.schema import Config
from qmemtune.engine.memory.estimate import Estimate, RunMemory, resident_bytes
from qmemtune.engine.memory.skeleton import base_skeleton
from qmemtune.engine.memory.workload import Workload
from qmemtune.errors import UserError

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files that say what a container may use and does use."""
LONGEST_SEARCH = 4
"""Traces of other batches before the search for one that fits gives up."""
SUGGESTIONS = 2


def capacity(device: torch.device) -> float:
    """Bytes that this process can have on a device, what it has already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    return float(resident_bytes() + min(psutil.virtual_memory().available, *_free_in_container()))


def _free_in_container() -> Iterator[float]:
    yield float("inf")
    for limit, used in CGROUPS:
        try:
            # The limit may be the word max; pages of files count as used, though they can be given back.
            yield float(Path(limit).read_text()) - float(Path(used).read_text()) + _file_pages(Path(used).parent)
        except (OSError, ValueError):
            continue


def _file_pages(group: Path) -> float:
    lines = (group / "memory.stat").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file ")))


def largest_batch(memory: RunMemory, workload: Workload, limit: float) -> int:
    """Rows of the largest batch of this kind that takes at most ``limit`` bytes; 0 if not even one row fits.

    Memory is nearly linear in rows: a line through two estimates is followed, and what it says is looked at.
    """
    low, high = 1, workload.rows
    least, most = (memory.estimate(workload.with_rows(rows)).total for rows in (low, high))
    if most <= limit or least > limit:
        return high if most <= limit else 0
    for _ in range(LONGEST_SEARCH):
        if high - low == 1:
            break
        rows = low + int((limit - least) / (most - least) * (high - low) + 1e-6)
        rows = min(max(rows, low + 1), high - 1)
        total = memory.estimate(workload.with_rows(rows)).total
        if total <= limit:
            low, least = rows, total
        else:
            high, most = rows, total
    return low


def smaller_batch(memory: RunMemory, workload: Workload, limit: float) -> Workload | None:
    """The largest smaller batch that fits and divides this one, so that a step keeps its rows; None without one."""
    most = min(largest_batch(memory, workload, limit), workload.rows - 1)
    rows = max((rows for rows in range(1, most + 1) if workload.rows % rows == 0), default=0)
    return workload.with_rows(rows) if rows else None


@dataclass(frozen=True)
class Memory:
    """A run's largest batch, and what estimates that and others."""

    run: RunMemory
    workload: Workload

    @property
    def estimate(self) -> Estimate:
        """For the largest batch."""
        return self.run.estimate(self.workload)


@dataclass(frozen=True)
class Suggestion:
    """Settings that would fit, as overrides."""

    overrides: str
    total: float
    """Estimated bytes."""

    def __str__(self) -> str:
        return f"{self.overrides} (about {size(self.total)})"


def suggestions(memory: RunMemory, workload: Workload, limit: float) -> list[Suggestion]:
    """Up to two ways to stay below ``limit`` bytes, the least change first; none if nothing that is known helps."""
    found = []
    for suggestion in _candidates(memory, workload, limit):
        found.append(suggestion)
        if len(found) == SUGGESTIONS:
            break
    return found


def _candidates(memory: RunMemory, workload: Workload, limit: float) -> Iterator[Suggestion]:
    fewer = smaller_batch(memory, workload, limit)
    if fewer is not None:
        yield Suggestion(batch_overrides(fewer), memory.estimate(fewer).total)
    if not workload.checkpointing:
        recomputed = replace(workload, checkpointing=True)
        key = "trainer.gradient_checkpointing=true"
        total = memory.estimate(recomputed).total
        if total <= limit:
            yield Suggestion(key, total)
        else:
            fewer = smaller_batch(memory, recomputed, limit)
            if fewer is not None:
                yield Suggestion(f"{key} {batch_overrides(fewer)}", memory.estimate(fewer).total)
    shorter = workload
    while shorter.tokens >= 64:
        shorter = shorter.with_tokens(shorter.tokens // 2)
        total = memory.estimate(shorter).total
        if total <= limit:
            yield Suggestion(f"data.max_length={shorter.tokens}", total)
            break
    if memory.config.quantization.kind == "none":
        smaller = quantised(memory)
        if smaller is not None and (total := smaller.estimate(workload).total) <= limit:
            yield Suggestion("quantization=nf4", total)


def quantised(memory: RunMemory) -> RunMemory | None:
    """The same run on a 4-bit base."""
    quantization = replace(memory.config.quantization, kind="nf4", dequantized_copies="never")
    device = torch.device("cpu" if memory.on_cpu else "cuda")
    config: Config = replace(memory.config, quantization=quantization)
    try:
        base = base_skeleton(config, weights=False)
        return RunMemory(config, device, runtime=memory.runtime, base=base, dtype=memory.dtype)
    except UserError:
        return None


def batch_overrides(workload: Workload) -> str:
    """Overrides for a batch, with as many rows a step as before."""
    text = f"trainer.per_device_train_batch_size={workload.rows}"
    if workload.accumulation > 1:
        text += f" trainer.gradient_accumulation_steps={workload.accumulation}"
    return text


def fit_warning(memory: RunMemory, workload: Workload, limit: float) -> str | None:
    """What to say about a run that does not fit; None when it does."""
    estimate = memory.estimate(workload)
    if estimate.total <= limit:
        return None
    rows = largest_batch(memory, workload, limit)
    text = f"the run takes about {size(estimate.total)} at its peak, and there are {size(limit)}"
    text += "" if estimate.device == "cpu" else " on the GPU"
    if rows:
        return f"{text}: the largest batch that fits is {rows} ({batch_overrides(workload.with_rows(rows))})"
    ways = " or ".join(str(way) for way in suggestions(memory, workload, limit))
    return f"{text}: not even a batch of one row fits" + (f"; {ways} would" if ways else "")


def largest_part(estimate: Estimate) -> str:
    """The part that takes most, in words."""
    part = max(estimate.PARTS, key=lambda name: getattr(estimate, name))
    return f"{part.replace('_', ' ')} {size(getattr(estimate, part))}"


def size(number: float) -> str:
    """Bytes for people, in GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
