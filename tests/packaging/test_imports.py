"""What must stay light loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "peft", "datasets", "accelerate", "pandas", "matplotlib"]


@pytest.mark.parametrize("module", ["qmemtune", "qmemtune.errors", "qmemtune.rundir", "qmemtune.config.compose"])
def test_light_modules_load_no_heavy_library(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
