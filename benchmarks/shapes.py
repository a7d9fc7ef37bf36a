"""Models of a published shape with random weights: speed and memory do not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama3_2_1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama3_1_8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Shapes that are filled with random weights, by name."""


def base_folder(name: str, cache: Path) -> str:
    """Where the base's weights are; those of a shape are made once."""
    if name not in SHAPES:
        return name
    folder = cache / name
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, dtype="bfloat16")
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)
