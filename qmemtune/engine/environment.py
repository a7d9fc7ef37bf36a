"""What a run ran on: versions, hardware, seed, command line."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata
from typing import Any

import psutil
import torch

from qmemtune.credentials import hide

PACKAGES = ("qmemtune", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


def describe_environment(*, seed: int, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Facts needed to repeat a run or to compare its speed."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [hide(word) for word in sys.argv],
        "working_directory": os.getcwd(),
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
    }


def version_of(package: str) -> str | None:
    """An installed package's version, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's model name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    try:
        import resource
    except ModuleNotFoundError:
        # Windows keeps the peak itself.
        return float(getattr(psutil.Process().memory_info(), "peak_wset", 0)) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_gpu_mib() -> float | None:
    """Largest memory of tensors on this process's GPU so far, MiB; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated() / 2**20


def seconds_since_start() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()
