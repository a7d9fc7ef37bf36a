"""A run does not keep kernels of shapes that it will not meet again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from qmemtune.cli.app import main
from qmemtune.models import kernel_caches

KEPT = """
import ctypes, json, sys
from qmemtune.models.kernel_caches import keep_fewer_kernels
if sys.argv[1] == "fewer":
    keep_fewer_kernels()
import torch

class Heap(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
left, right = torch.ones(1100, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
for rows in range(400, 1100):
    left[:rows] @ right
print(json.dumps(heap().field7))  # bytes in use
"""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in kernel_caches.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_verbs_bound_the_caches_unless_their_size_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = kernel_caches.VARIABLES
    monkeypatch.setenv(given, "7")
    # So that what the verb sets is taken back.
    monkeypatch.setenv(other, "")
    monkeypatch.delenv(other)
    assert main(["recipes"]) == 0
    assert os.environ[given] == "7"
    assert os.environ[other] == kernel_caches.CAPACITY


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16", False) or not sys.platform.startswith("linux"),
    reason="needs a processor for which oneDNN makes kernels for bfloat16 products, and glibc",
)
def test_kernels_of_shapes_that_are_gone_are_gone_too() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout))

    assert kept("fewer") < 0.6 * kept("as ever")
