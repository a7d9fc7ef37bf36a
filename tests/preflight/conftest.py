"""A small run on the tiny Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qmemtune.config.compose import Composed, compose


@pytest.fixture
def run_config(tiny_llama_dir: Path, tmp_path: Path, tmp_path_factory) -> Callable[..., Composed]:
    """Makes a run's config; arguments are overrides that come last."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = ({"prompt": f"say {i}", "completion": f" {i} and {i + 1}"} for i in range(10, 26))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(*overrides: str) -> Composed:
        return compose(
            [
                f"model.path={tiny_llama_dir}",
                "model.compute_dtype=float32",
                f"data.path={file}",
                "data.eval_fraction=0",
                "evaluation.at_end=false",
                "adapter=lora",
                "adapter.r=4",
                "trainer.per_device_train_batch_size=4",
                f"run_dir={tmp_path / 'run'}",
                *overrides,
            ]
        )

    return make
