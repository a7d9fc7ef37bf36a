"""What of this machine and installation a run depends on, each finding with its remedy (``qmemtune doctor``)."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from qmemtune.engine.environment import processor_name, version_of
from qmemtune.engine.memory.fit import capacity, size
from qmemtune.engine.versions import python_range, required, tested
from qmemtune.errors import first_line
from qmemtune.models.hardware import bf16_is_fast, matmul_seconds, pick_device
from qmemtune.rundir import cache_root

HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 3.0
LITTLE_DISK = 5 * 2**30
"""Bytes; a small model's weights and a few checkpoints take about so much."""
LITTLE_MEMORY = 2 * 2**30

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Result:
    """One thing that was looked at."""

    name: str
    level: Level
    """error: training is impossible; warning: something will go wrong or be slow; note: good to know."""
    found: str
    remedy: str | None = None


def examine(folder: Path) -> dict[str, Any]:
    """Look at everything.

    Args:
        folder: where runs would be written.

    Returns:
        ``can_train`` and ``checks``, a list of :class:`Result` as dicts.
    """
    results = [*python(), *packages(), *devices(), *bitsandbytes(), *disks(folder), *hub()]
    return {
        "can_train": all(result.level != "error" for result in results),
        "checks": [asdict(result) for result in results],
    }


def python() -> Iterator[Result]:
    """The interpreter."""
    found = platform.python_version()
    allowed = python_range()
    if allowed is not None and not allowed.contains(found):
        yield Result("python", "error", f"{found}; {allowed} is needed", "make an environment with a newer Python")
    else:
        yield Result("python", "ok", f"{found} ({sys.executable})")


def packages() -> Iterator[Result]:
    """Every package that is needed: there, in the range that should work, and beside the version that is tested."""
    good = []
    for name, allowed in required().items():
        found, known = version_of(name), tested().get(name)
        install = f"run `pip install '{name}=={known}'`" if known else f"run `pip install '{name}{allowed}'`"
        if found is None:
            yield Result(name, "error", "not installed", install)
        elif not allowed.contains(found, prereleases=True):
            yield Result(name, "warning", f"{found} is outside the range that works ({allowed})", install)
        elif known is not None and found != known and not same_series(found, known):
            yield Result(name, "note", f"{found}; tested with {known}", f"if something fails, {install}")
        else:
            good.append(f"{name} {found}")
    yield Result("packages", "ok", ", ".join(good))


def same_series(found: str, known: str) -> bool:
    """Whether two versions differ in their last part or local label only."""

    def series(version: str) -> list[str]:
        return version.partition("+")[0].split(".")[:2]

    return series(found) == series(known)


def devices() -> Iterator[Result]:
    """Where a run would compute, how fast it is in bfloat16, and how much memory is free."""
    device = pick_device()
    memory = f"{size(capacity(device))} of memory free"
    if device.type == "cuda":
        count = torch.cuda.device_count()
        yield Result("device", "ok", f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda}), {memory}")
        if count > 1 and "LOCAL_RANK" not in os.environ:
            yield Result(
                "gpus",
                "warning",
                f"{count} GPUs are visible, and one process uses one",
                f"start one a GPU: torchrun --nproc-per-node {count} -m qmemtune train ..., or set "
                "CUDA_VISIBLE_DEVICES=0",
            )
    else:
        level: Level = "ok" if capacity(device) > LITTLE_MEMORY else "warning"
        remedy = None if level == "ok" else "close other programs; `qmemtune estimate` says what a run takes"
        yield Result("device", level, f"{processor_name()}, {os.cpu_count()} cores, no GPU, {memory}", remedy)
        if Path("/proc/driver/nvidia").exists():
            yield Result(
                "cuda",
                "warning",
                f"there is an NVIDIA driver, but torch {torch.__version__} does not see a GPU",
                "install a torch build for CUDA (https://pytorch.org/get-started), or check CUDA_VISIBLE_DEVICES",
            )
    yield bf16(device)


def bf16(device: torch.device) -> Result:
    """Which data type a run takes by itself, and the measured reason."""
    slow, fast = matmul_seconds(torch.float32, device), matmul_seconds(torch.bfloat16, device)
    ratio = f"a product in bfloat16 takes {fast / slow:.2f} times as long as in float32"
    if bf16_is_fast(device):
        return Result("bfloat16", "ok", f"{ratio}; runs compute in bfloat16")
    return Result(
        "bfloat16",
        "note",
        f"{ratio}; runs compute in float32",
        "nothing to mend: this hardware has no fast bfloat16 (model.compute_dtype=bfloat16 saves memory, not time)",
    )


def bitsandbytes() -> Iterator[Result]:
    """Whether 4-bit and 8-bit bases work on this device: a layer of each is really run."""
    name = "bitsandbytes"
    remedy = "run `pip install -U bitsandbytes`, or train with quantization=none and optimizer=adamw"
    if find_spec(name) is None:
        # The missing package is a finding already.
        return
    device = pick_device()
    try:
        import bitsandbytes as bnb

        for layer in (
            bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"),
            bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
        ):
            made = layer.to(device)(torch.ones(2, 64, device=device))
            if not bool(made.isfinite().all()):
                raise RuntimeError(f"{type(layer).__name__} gives no numbers")
    except Exception as error:  # noqa: BLE001 - a library built for another machine fails in any way
        yield Result(name, "warning", f"4-bit and 8-bit layers fail on {device.type}: {first_line(error)}", remedy)
        return
    yield Result(name, "ok", f"4-bit and 8-bit layers work on {device.type}")


def disks(folder: Path) -> Iterator[Result]:
    """Room for runs, for converted models and for downloads."""
    hub_cache = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    places = {
        "disk for runs": (folder, "choose another disk with run_dir="),
        "disk for models": (cache_root(), "set QMEMTUNE_CACHE to a folder on another disk"),
        "disk for downloads": (Path(hub_cache), "set HF_HOME to a folder on another disk"),
    }
    for name, (place, remedy) in places.items():
        there = place.expanduser().absolute()
        while not there.is_dir():
            there = there.parent
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            level: Level = "error" if name == "disk for runs" else "warning"
            yield Result(name, level, f"{there} cannot be written", remedy)
        elif free < LITTLE_DISK:
            yield Result(name, "warning", f"{size(free)} free in {there}", f"free some, or {remedy}")
        else:
            yield Result(name, "ok", f"{size(free)} free in {there}")


def hub() -> Iterator[Result]:
    """Whether models and data sets can be downloaded. Being offline is no fault: local files do without."""
    remedy = "give local files with model.path= and data.path=, or what is in the cache already"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Result("hub", "note", "HF_HUB_OFFLINE is set: nothing is downloaded", f"unset it, or {remedy}")
        return
    endpoint = os.environ.get("HF_ENDPOINT", HUB)
    if not endpoint.startswith(("https://", "http://")):
        yield Result("hub", "note", "HF_ENDPOINT is no address of a hub", f"unset it, or {remedy}")
        return
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S):  # noqa: S310 - the scheme is checked
            pass
    except HTTPError as error:
        # It answers, if not to this question.
        if error.code >= 500:
            yield Result("hub", "note", f"{endpoint} answers {error.code}", f"try again later, or {remedy}")
            return
    except (OSError, ValueError) as error:
        found = f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})"
        yield Result("hub", "note", found, f"connect (or set HTTPS_PROXY), or {remedy}")
        return
    from huggingface_hub import get_token

    known = "with a token" if get_token() else "without a token: gated and private models need `hf auth login`"
    yield Result("hub", "ok", f"{endpoint} can be reached, {known}")
