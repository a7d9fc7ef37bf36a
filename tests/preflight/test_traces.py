"""Traces are kept for the next start: the same estimate, never another one's, and nothing lost with a damaged file."""

from __future__ import annotations

import pytest
import torch

from qmemtune.config.compose import compose
from qmemtune.engine.memory import traces
from qmemtune.engine.memory.estimate import RunMemory
from qmemtune.engine.memory.tracing import Tracer
from qmemtune.engine.memory.workload import Workload
from qmemtune.models.hardware import bf16_is_fast
from qmemtune.rundir import cache_root

CPU = torch.device("cpu")
BATCH = Workload(2, 16, 8)
OTHER_DTYPE = "float32" if bf16_is_fast(CPU) else "bfloat16"
"""What a run on this machine does not compute in by itself."""


@pytest.fixture
def traced(monkeypatch, tmp_path, tiny_llama_dir):
    """Estimates a run of the tiny model, and says how often it was traced for that."""
    monkeypatch.setenv("QMEMTUNE_CACHE", str(tmp_path / "cache"))
    calls = []
    step = Tracer.step
    monkeypatch.setattr(Tracer, "step", lambda *args, **options: calls.append(1) or step(*args, **options))

    def estimate(*overrides: str, batch: Workload = BATCH) -> tuple[dict, int]:
        calls.clear()
        given = [
            f"model.path={tiny_llama_dir}",
            "data.path=generated:word_lists",
            "adapter=queryable",
            "adapter.r=2",
            *overrides,
        ]
        memory = RunMemory(compose([*given, *overrides]).config, CPU, runtime=0.0)
        return memory.estimate(batch).as_dict(), len(calls)

    return estimate


def test_the_second_start_does_not_trace(traced):
    first, times = traced()
    assert times == 1
    assert traced() == (first, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.r=4"],
        ["adapter.block_size=1"],
        ["adapter.target_modules=[q_proj]"],
        ["adapter=lora"],
        ["trainer.fused_layers=false"],
        [f"model.compute_dtype={OTHER_DTYPE}"],
        ["model.attn_implementation=eager"],
        ["quantization=int8"],
    ],
)
def test_whatever_it_follows_from_is_traced_anew(traced, overrides):
    traced()
    assert traced(*overrides)[1] == 1


@pytest.mark.parametrize("batch", [Workload(3, 16, 8), Workload(2, 17, 8), Workload(2, 16, 9)])
def test_another_batch_is_traced_anew(traced, batch):
    traced()
    assert traced(batch=batch)[1] == 1


def test_other_code_is_traced_anew(traced, monkeypatch):
    traced()
    monkeypatch.setattr(traces, "code_digest", lambda: "another version")
    assert traced()[1] == 1


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"activations": 1}', b"\xff\xfe", b'{"activations": NaN, "in_heap": 1}', b"null"]
)
def test_a_damaged_file_is_made_again(traced, damage):
    first, _ = traced()
    (file,) = (cache_root() / traces.FOLDER).iterdir()
    file.write_bytes(damage)
    assert traced() == (first, 1)
    assert traced() == (first, 0)


def test_where_nothing_can_be_written_it_is_traced_each_time(traced):
    folder = cache_root()
    folder.mkdir(parents=True)
    (folder / traces.FOLDER).write_text("a file in its place")
    first, _ = traced()
    assert traced() == (first, 1)
