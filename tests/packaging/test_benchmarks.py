"""The benchmarks keep up with what they measure: each can be loaded, and says what it takes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HELPERS = {"report.py", "shapes.py"}


@pytest.mark.parametrize("script", [path.name for path in sorted(BENCHMARKS.glob("*.py")) if path.name not in HELPERS])
def test_a_benchmark_says_what_it_takes(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: {script}" in capsys.readouterr().out
