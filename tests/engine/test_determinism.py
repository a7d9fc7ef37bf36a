"""The same config, seed and machine give the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qmemtune.engine.language import LanguageTask
from qmemtune.engine.run import train
from qmemtune.errors import UserError

TWO_EPOCHS = ("trainer.max_steps=8", "evaluation.every_steps=4", "trainer.logging_steps=1")
TIMES = ("tokens_per_s", "seconds", "step_s_median", "first_step_done_s", "total_s", "peak_rss_mib")


def outcome(summary, read_lines, adapter_bytes):
    """All that does not tell the time: weights, and every number of the log."""
    lines = read_lines(Path(summary["run_dir"]) / "metrics.jsonl")
    logged = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return adapter_bytes(Path(summary["adapter"])), logged


@pytest.mark.parametrize(
    ("adapter", "extra"),
    [
        ("lora", ()),
        ("lora", ("quantization=nf4", "trainer.length_grouping=false")),
        ("queryable", ("adapter.instruction_prior=0.5", "trainer.gradient_accumulation_steps=2")),
        ("lora", ("trainer.packing=true", "data.max_length=64")),
    ],
)
def test_repetition_and_workers_change_nothing(composed, adapter_bytes, read_lines, adapter, extra):
    made = {
        name: train(composed(*TWO_EPOCHS, *extra, *given, adapter=adapter, run=name))
        for name, given in (
            ("once", ()),
            ("again", ("trainer.num_workers=2",)),
        )
    }
    once, again = (outcome(summary, read_lines, adapter_bytes) for summary in made.values())
    assert once == again


def test_another_seed_makes_another_adapter(composed, adapter_bytes):
    weights = {
        adapter_bytes(Path(train(composed(f"seed={seed}", "trainer.max_steps=1", run=str(seed)))["adapter"]))
        for seed in (0, 1)
    }
    assert len(weights) == 2


def test_deterministic_kernels_are_in_force_during_the_run_only(composed, monkeypatch):
    seen = []
    healthy = LanguageTask.loss

    def loss(self, model, batch):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return healthy(self, model, batch)

    monkeypatch.setattr(LanguageTask, "loss", loss)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.setenv(name, "")  # the run sets it; what was here before comes back after the test
    train(composed("trainer.deterministic=true", "trainer.max_steps=1", run="on"))
    assert seen == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert not torch.are_deterministic_algorithms_enabled()
    train(composed("trainer.max_steps=1", run="off"))
    assert seen == [True, False]


def test_an_operation_without_a_deterministic_kernel_is_named(composed, monkeypatch):
    def loss(self, model, batch):
        # One of few such operations on a CPU.
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    monkeypatch.setattr(LanguageTask, "loss", loss)
    with pytest.raises(UserError, match="put_ does not have a deterministic implementation") as error:
        train(composed("trainer.deterministic=true"))
    assert error.value.findings[0].where == "trainer.deterministic"


@pytest.mark.slow  # starts the real command twice
def test_two_processes_of_the_command_make_the_same_adapter(composed, adapter_bytes, tmp_path):
    config = composed().config
    overrides = [
        f"model.path={config.model.path}",
        f"data.path={config.data.path}",
        "adapter=queryable",
        "trainer.max_steps=6",
        "trainer.per_device_train_batch_size=3",
    ]
    made = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "qmemtune", "train", *overrides, f"run_dir={tmp_path / name}"]
        # Another order of hashes, as every process has its own.
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": str(len(made))})
        made.append(adapter_bytes(tmp_path / name / "adapter"))
    assert made[0] == made[1]
