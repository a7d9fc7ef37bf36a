"""torch.compile's compiler, left out of a verb's imports until something is compiled.

bitsandbytes wraps functions in torch.compile when it is imported, and ``import peft`` imports bitsandbytes. That alone
loads torch's inductor: 1.1 of the 7.1 seconds of imports before a training run (AVX2, 2 cores), and no function of
these runs on a CPU, where bitsandbytes has kernels of its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "bitsandbytes.backends.default.ops"


def compiled_later(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """A torch.compile whose functions are compiled, with the same options, at their first call."""

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            import torch

            nonlocal compiled
            if torch.compiler.is_compiling():
                # Part of something that is being compiled.
                return function(*args, **kwargs)
            if compiled is None:
                compiled = compile_now(function, **options)
            return compiled(*args, **kwargs)

        return call

    return compile_later


class _Finder(MetaPathFinder):
    """Lets :data:`MODULE` be imported with a torch.compile that compiles later."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == MODULE else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            import torch

            real = torch.compile
            torch.compile = compiled_later(real)
            try:
                run(module)
            finally:
                torch.compile = real

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Inside, bitsandbytes is imported without loading the compiler."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
