from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from qmemtune.errors import UserError
from qmemtune.models import hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget() -> None:
    hardware._cpu_bf16_is_fast.cache_clear()
    yield
    hardware._cpu_bf16_is_fast.cache_clear()


def test_auto_is_float32_without_bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr(hardware, "matmul_seconds", lambda dtype, **_: pytest.fail("measured without need"))
    assert hardware.compute_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(("bf16", "expected"), [(1.0, torch.bfloat16), (3.0, torch.float32)])
def test_auto_measures_where_the_instructions_exist(
    monkeypatch: pytest.MonkeyPatch, bf16: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(hardware, "matmul_seconds", lambda dtype, **_: bf16 if dtype == torch.bfloat16 else 2.0)
    assert hardware.compute_dtype("auto", CPU) == expected


def test_what_other_processes_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine products of several threads take as long in either type: they wait for each other."""
    seen = []

    def measured(dtype: torch.dtype, clock: Callable[[], float]) -> float:
        seen.append((clock, torch.get_num_threads()))
        return 1.0

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(hardware, "matmul_seconds", measured)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        hardware.compute_dtype("auto", CPU)
        assert seen == [(time.thread_time, 1)] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_named_types_and_refusals() -> None:
    assert hardware.compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert hardware.compute_dtype("float16", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="loss scaling"):
        hardware.compute_dtype("float16", CPU)
    with pytest.raises(UserError, match="int7"):
        hardware.compute_dtype("int7", CPU)


def test_the_launcher_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert hardware.pick_device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.pick_device() == CPU


def test_autocast_only_below_float32() -> None:
    a = torch.ones(2, 2)
    with hardware.autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with hardware.autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
