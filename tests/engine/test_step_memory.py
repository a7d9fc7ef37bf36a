"""What training steps keep of memory: nothing of the steps before, and few holes between what is in use."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from collections import Counter

import pytest
from torch import Tensor

from qmemtune.engine.run import train

VARIANTS = {
    "lora": ("lora", ()),
    "queryable": ("queryable", ()),
    "plain_layers": ("queryable", ("trainer.fused_layers=false",)),
    "prior": ("queryable", ("adapter.instruction_prior=1", "adapter.prior_kl=0.1")),
    "checkpointing": ("queryable", ("trainer.gradient_checkpointing=true",)),
    "packed": ("queryable", ("trainer.packing=true",)),
    "router_log": ("queryable", ("trainer.route_stats_steps=1",)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_leaves_no_tensors_to_the_garbage_collector(composed, recorder, name):
    # Tensors in a reference cycle stay until Python happens to look for cycles, which it does by the number of objects,
    # not by their size: a run grows by megabytes a step.
    adapter, options = VARIANTS[name]
    left: Counter[str] = Counter()

    def look(step: int) -> None:
        gc.collect()
        if step > 3:
            left.update(type(found).__name__ for found in gc.garbage if isinstance(found, Tensor))
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)

    gc.disable()
    try:
        train(composed(*options, "trainer.max_steps=6", "trainer.logging_steps=100", adapter=adapter),
              progress=recorder(look))  # fmt: skip
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


HOLES = """
import ctypes, sys
import torch
from qmemtune.engine.fused import room

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
# What is freed from a mapping raises the threshold below which the heap serves a tensor.
warm = torch.empty(30 << 20, dtype=torch.uint8)
del warm

like = torch.empty(0)
passing, handed_on = (room.PASSING, room.HANDED_ON) if sys.argv[1] == "room" else (0, 0)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
shares, kept = [], []
for start in range(8):
    # Where in a block of 64 bytes the heap's end lies decides whether a place fits by chance: it is moved on by 16 each
    # time, and larger tensors leave the holes of earlier starts alone.
    small = libc.malloc(200_000 + 16 * start)
    shape = (3, 333_333 + 40_000 * start)
    before = libc.mallinfo2()
    for layer in range(10):
        normed = room.empty(like, shape, torch.float32, passing)
        kept.append(torch.empty(shape))
        result = room.empty(like, shape, torch.float32, handed_on)
        del normed
        kept.append(torch.empty(shape))
        del result
    now = libc.mallinfo2()
    shares.append((now.fordblks - before.fordblks) / (now.uordblks - before.uordblks))
print(max(shares))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_layers_leave_few_holes_in_the_heap():
    def holes(how: str) -> float:
        """The most free bytes in the heap after one of several starts, as a share of those in use."""
        done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert holes("room") < 0.1
    # What it is there for. If this fails, the allocator has changed, and there is nothing left to make room for.
    assert holes("none") > 0.4
