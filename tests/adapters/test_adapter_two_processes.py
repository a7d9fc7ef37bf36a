"""Two data-parallel processes reach the weights of one process with the same global batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("data_parallel_worker.py")
VARIANTS = [
    "plain",
    "checkpointed",
    "top_k",
    "one_block",
    "a_layer_a_block",
    "no_summary",
    "prior",
    "prior_on_one_rank_only",
    "prior_without_instructions",
]


def launch(folder: Path, rank: int, world: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(WORKER), str(folder), *VARIANTS]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_reach_the_weights_of_one(tmp_path):
    """Every variant in the same two processes: starting them is what takes the time.

    DDP raises if any parameter stays unused in a step; with a prior, also where no row or only one rank's rows have an
    instruction.
    """
    processes = [launch(tmp_path, rank, 2) for rank in (0, 1)]
    try:
        spec = importlib.util.spec_from_file_location("data_parallel_worker", WORKER)
        worker = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(worker)
        one = {variant: worker.train(variant, 0, 1) for variant in VARIANTS}
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for variant in VARIANTS:
        for name, expected in one[variant].items():
            assert torch.equal(first[variant][name], second[variant][name])
            torch.testing.assert_close(
                first[variant][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=f"{variant} {name}": f"{n}: {m}"
            )
