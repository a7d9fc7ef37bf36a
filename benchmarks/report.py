"""What every benchmark needs to report: the machine, a table, and its section in benchmarks/README.md."""

from __future__ import annotations

import datetime
import os
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from qmemtune.engine.environment import processor_name

README = Path(__file__).with_name("README.md")


def machine() -> str:
    """One line: processor or GPU, cores, memory, versions."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        features = [name for name in ("amx_bf16", "avx512_bf16", "avx512", "avx2") if has_feature(name)]
        device = f"{processor_name()}, {os.cpu_count()} cores, {features[0] if features else 'no AVX'}"
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{device}, {gib:.0f} GiB, Python {platform.python_version()}, {packages}"


def has_feature(name: str) -> bool:
    """Whether torch knows the processor to have a feature."""
    return bool(torch.cpu.get_capabilities().get(name, False))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median with quartiles, ``1.020 (1.011 to 1.034)``; with fewer than four values, the smallest and largest."""
    low, high = min(values), max(values)
    if len(values) > 3:
        low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def bootstrap_share(share: Callable[[Sequence[int]], float], count: int, resamples: int = 2000) -> str:
    """A share over ``count`` rows or seeds, told by their indices, with its 95 % bootstrap interval, in per cent."""
    rng, everyone = random.Random(0), range(count)
    drawn = sorted(share(rng.choices(everyone, k=count)) for _ in range(resamples))
    low, high = drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples)]
    return f"{share(everyone):.1%} ({low:.1%} to {high:.1%})"


def write_section(heading: str, text: str) -> None:
    """Put the section with this heading in the place of the one that benchmarks/README.md has, or at its end."""
    start, end = f"<!-- {heading} -->", f"<!-- end of {heading} -->"
    where = f"Machine: {machine()}, {datetime.date.today().isoformat()}."
    section = f"{start}\n### {heading}\n\n{text.strip()}\n\n{where}\n{end}"
    old = README.read_text(encoding="utf-8") if README.exists() else "# Benchmarks\n"
    if start in old:
        before, _, rest = old.partition(start)
        new = before + section + rest.partition(end)[2]
    else:
        new = old.rstrip() + "\n\n" + section + "\n"
    README.write_text(new, encoding="utf-8")
