"""A verb's imports leave torch's compiler out; what bitsandbytes compiles is compiled when it is first called."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qmemtune.cli.compile_later import compiled_later, compiler_left_out

VERB = """
import sys
from qmemtune.cli.output import output
with output(True, False, True):
    import qmemtune.engine.run
import torch
print(torch.compile.__module__, "bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""


def test_the_imports_of_a_run_load_no_compiler():
    done = subprocess.run([sys.executable, "-c", VERB], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", "True", "False"]


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_a_function_is_compiled_once_at_its_first_call(options):
    compiled = []

    def compile_now(function, **given):
        compiled.append(given)
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))

    later = compiled_later(compile_now)

    @later(**options)
    def double(x, times=2):
        """Doc."""
        return x * times

    assert compiled == []
    assert double(3) == ("compiled", 6)
    assert double(3, times=3) == ("compiled", 9)
    assert compiled == [options]
    assert (double.__name__, double.__doc__) == ("double", "Doc.")
    assert later(len)([1]) == ("compiled", 1)


def test_nothing_is_left_behind():
    before = list(sys.meta_path)

    def fail():
        assert len(sys.meta_path) == len(before) + 1
        raise ImportError("a library is broken")

    with pytest.raises(ImportError), compiler_left_out():
        fail()
    assert sys.meta_path == before
