"""Shell completion of overrides, through the shells' own protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
START = [sys.executable, "-c", "from qmemtune.cli.app import main; main()"]


def complete(shell: str, **variables: str) -> str:
    environment = os.environ | {"_QMEMTUNE_COMPLETE": f"complete_{shell}"} | variables
    return subprocess.run(START, env=environment, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe", "=", "qu"], ["quickstart"]),
        (["recipe", "="], RECIPES),
        (["adapter", "=", "q"], ["queryable"]),
        (["trainer.max_s"], ["trainer.max_steps="]),
        (["~trainer.max_s"], ["~trainer.max_steps"]),
        (["+data.chat"], ["+data.chat="]),
        (["trainer.keep_best", "=", "t"], ["true"]),
        (
            ["seed=1", "quant"],
            ["quantization=", "quantization.kind=", "quantization.double_quant=", "quantization.dequantized_copies="],
        ),
    ],
)
def test_bash_breaks_words_at_the_sign(words, expected):
    line = ["qmemtune", "train", *words]
    out = complete("bash", COMP_WORDS=" ".join(line), COMP_CWORD=str(len(line) - 1))
    assert out.split() == expected


def test_zsh_keeps_the_whole_word():
    out = complete("zsh", _TYPER_COMPLETE_ARGS="qmemtune train quantization.kind=n")
    assert '"quantization.kind=nf4"' in out
    assert '"quantization.kind=none"' in out
