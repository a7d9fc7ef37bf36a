"""Small runs on the tiny Llama: a data file, a config, a progress that records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qmemtune.config.compose import Composed, compose

WORDS = ["apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "sugar", "house", "green"]


class Recorder:
    """A progress that keeps what it was told."""

    def __init__(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.messages: list[str] = []
        self.started: list[tuple[int, dict[str, Any]]] = []
        self.steps: list[int] = []
        self.logs: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.finished = 0
        self.on_step = on_step

    def message(self, text: str) -> None:
        self.messages.append(text)

    def start(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        self.started.append((total_steps, dict(facts)))

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.steps.append(step)
        self.on_step(step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.logs.append(dict(metrics))

    def rows(self, what: str, done: int, total: int) -> None:
        pass

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        self.evaluations.append(dict(metrics))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 prompt/completion rows of unequal length."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for i in range(26):
        words = [WORDS[(i * 7 + j * 3) % 10] for j in range(1 + i % 5)]
        lines.append({"prompt": "reverse: " + " ".join(words) + " ->", "completion": " " + " ".join(words[::-1])})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def composed(tiny_llama_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Composed]:
    """Makes a run's config; arguments are overrides that come last."""

    def make(*overrides: str, adapter: str = "lora", run: str = "run") -> Composed:
        small = ["adapter.r=4", "adapter.dropout=0.1"]
        if adapter == "queryable":
            small = ["adapter.r=4", "adapter.num_atoms=4", "adapter.key_dim=4", "adapter.block_size=2"]
        return compose(
            [
                f"model.path={tiny_llama_dir}",
                "model.compute_dtype=float32",
                f"data.path={rows_file}",
                "data.eval_fraction=0.2",
                f"adapter={adapter}",
                *small,
                "optimizer.learning_rate=0.01",
                "trainer.per_device_train_batch_size=3",
                "trainer.max_steps=4",
                "trainer.logging_steps=2",
                "evaluation.at_end=true",
                f"run_dir={tmp_path / run}",
                *overrides,
            ]
        )

    return make


@pytest.fixture
def recorder() -> type[Recorder]:
    """The class of progress that keeps what it was told."""
    return Recorder


@pytest.fixture
def adapter_bytes() -> Callable[[Path], bytes]:
    """Reads the weights of a saved adapter."""
    return lambda folder: (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def read_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the objects of a JSON-lines file."""
    return lambda file: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
