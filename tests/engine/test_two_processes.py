"""Two data-parallel processes train as one process with the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qmemtune.config.dump import to_yaml
from qmemtune.engine.run import train

SCRIPT = """
import sys
from pathlib import Path
from qmemtune.config.of_run import load_resolved
from qmemtune.engine.run import train

train(load_resolved(Path(sys.argv[1]), sys.argv[2:]))
"""

COMMON = (
    "adapter.dropout=0",
    # 18 training rows: three whole global batches of 6, so that no row is repeated to fill one up.
    "data.max_train_rows=18",
    "trainer.max_steps=4",
    "trainer.save_steps=2",
    "evaluation.every_steps=2",
)


def torchrun(config: Path, *overrides: str) -> None:
    """Run the engine in two processes on the CPU."""
    script = config.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    repository = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": repository, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with subprocess.Popen(
        [*command, str(script), str(config), *overrides],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launched:
        try:
            _, errors = launched.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            # The launcher's children would live on.
            os.killpg(launched.pid, signal.SIGKILL)
            raise
    assert launched.returncode == 0, errors[-4000:]


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_two_processes_equal_one(composed, tmp_path, read_lines, adapter):
    more = ("adapter.instruction_prior=0.5", "adapter.prior_kl=0.1") if adapter == "queryable" else ()
    one = train(composed(*COMMON, *more, "trainer.per_device_train_batch_size=6", adapter=adapter, run="one"))
    made = composed(*COMMON, *more, adapter=adapter, run="two")
    config = tmp_path / "two.yaml"
    config.write_text(to_yaml(made.config), encoding="utf-8")
    torchrun(config)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["steps"] == one["steps"]
    assert two["tokens"] == one["tokens"]
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    expected = load_file(Path(one["adapter"]) / "adapter_model.safetensors")
    found = load_file(Path(two["adapter"]) / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    # One process writes: no line stands there twice.
    lines = [(line["event"], line["step"]) for line in read_lines(tmp_path / "two" / "metrics.jsonl")]
    assert len(lines) == len(set(lines))


@pytest.mark.slow
def test_two_processes_resume_in_the_second_epoch(composed, tmp_path):
    made = composed(*COMMON, "trainer.max_steps=6", "trainer.save_steps=1", "trainer.save_total_limit=9", run="two")
    config = tmp_path / "two.yaml"
    config.write_text(to_yaml(made.config), encoding="utf-8")
    torchrun(config)
    weights = Path("adapter") / "adapter_model.safetensors"
    whole = (tmp_path / "two" / weights).read_bytes()
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-5"
    torchrun(config, f"resume={checkpoint}", f"run_dir={tmp_path / 'resumed'}")
    assert (tmp_path / "resumed" / weights).read_bytes() == whole
