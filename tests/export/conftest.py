"""Finished runs on tiny random models: base, adapter with random weights, and data, without any training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from qmemtune.adapters import apply_adapter
from qmemtune.config.adapters import AdapterConfig
from qmemtune.config.data import DataConfig
from qmemtune.config.export import ExportConfig
from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.config.schema import Config
from qmemtune.models.loading import load_base
from qmemtune.rundir import RunDir

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MakeRun = Callable[..., tuple[RunDir, Config]]


def model_config(name: str, vocabulary: int) -> PreTrainedConfig:
    if name == "gpt2":
        return GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=4, n_head=4, n_positions=128)
    if name == "qwen3":
        return Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=True, **SIZES)
    return LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **SIZES)


@pytest.fixture(scope="session")
def base_folder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``base_folder(architecture, dtype)``: a tiny model with weights large enough to say something."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model_config(name, len(tokenizer)))
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            made[name, dtype] = tmp_path_factory.mktemp(name)
            model.to(dtype).save_pretrained(made[name, dtype])
            tokenizer.save_pretrained(made[name, dtype])
        return made[name, dtype]

    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["fox", "dog", "jumps", "lazy", "brown", "quick", "over", "capital", "France", "Paris"]
    lines = [
        {"instruction": f"Say {words[i % 10]}", "input": "", "output": " ".join(words[(i * j) % 10] for j in range(5))}
        for i in range(40)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def make_run(base_folder: Callable[..., Path], rows: Path, tmp_path: Path) -> MakeRun:
    """``make_run(adapter, architecture=, kind=, format=)``: a run folder with a saved adapter, and its config."""

    def run(
        adapter: AdapterConfig,
        architecture: str = "llama",
        kind: str = "none",
        dtype: torch.dtype = torch.float32,
        base_path: Path | None = None,
        **export: object,
    ) -> tuple[RunDir, Config]:
        config = Config(
            model=ModelConfig(path=str(base_path or base_folder(architecture, dtype)), compute_dtype="float32"),
            data=DataConfig(path=str(rows), eval_fraction=0.3, max_rejected=0.0),
            adapter=adapter,
            quantization=QuantizationConfig(kind=kind),
            # Random adapters are far from any static stand-in; tests of the limits set their own.
            export=ExportConfig(
                **{
                    "base": "dequantized",
                    "fold": "mean",
                    "calibration_rows": 8,
                    "fidelity_rows": 6,
                    "max_kl": 100.0,
                    "max_loss_increase": 100.0,
                }
                | export
            ),
        )
        model = apply_adapter(load_base(config.model, config.quantization), adapter, seed=0)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not name.endswith("magnitude_vector.default.weight"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = RunDir(tmp_path / "run")
        shutil.rmtree(folder.path, ignore_errors=True)
        model.save_pretrained(folder.adapter, save_embedding_layers=False)
        return folder, config

    return run
