"""Options of the base model: where it comes from, and how its frozen weights are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qmemtune.config.missing import MISSING


@dataclass
class MlpConfig:
    """model.path=generated:mlp only: the base of a regression, trained on the first function."""

    width: int = 64
    """Units of each hidden layer."""
    depth: int = 3
    """Hidden layers."""
    pretrain_steps: int = 3000
    """Optimizer steps on the first function, without noise."""


@dataclass
class ModelConfig:
    """The base model and its tokenizer."""

    path: str = MISSING
    """Hub id, local folder, GGUF file, package:NAME/FILE (a file inside an installed Python package), or
    generated:mlp (a regression's base)."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from path."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the arithmetic; auto takes bfloat16 where the hardware is fast at it, else float32."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, eager, flash_attention_2, ...; if not set transformers' choice, and in training one of
    our own for rows without padding and, on a CPU, for short rows."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code on this machine."""
    mlp: MlpConfig = field(default_factory=MlpConfig)


@dataclass
class QuantizationConfig:
    """How the frozen base weights are stored."""

    kind: Literal["none", "nf4", "fp4", "int8"] = "none"
    """none keeps the compute dtype; nf4 and fp4 are 4-bit, int8 is 8-bit, all through bitsandbytes."""
    double_quant: bool = True
    """4-bit only: quantise the quantisation constants too (0.4 bit a weight less)."""
    dequantized_copies: Literal["auto", "never"] = "auto"
    """4-bit on a CPU: auto keeps a dequantised copy of each weight while training and generating, when all copies fit
    into a quarter of the free memory: the same numbers in less time, for more memory."""
