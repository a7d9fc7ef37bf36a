"""Digests of a base model: its values count, not how and when they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmemtune.config.schema import ModelConfig
from qmemtune.models import fingerprint
from qmemtune.models.fingerprint import base_digests, pieces


@pytest.fixture
def base(tiny_llama_dir, tmp_path):
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))


def digests(base):
    return base_digests(ModelConfig(str(base)))


def test_files_and_places_do_not_count(base, tmp_path):
    before, file = digests(base), base / "model.safetensors"
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    assert digests(moved) == before
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, base / part)
    file.unlink()
    weight_map = {name: part for part, held in parts.items() for name in held}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert digests(base) == before


@pytest.mark.parametrize("whole", [True, False])
def test_every_tensor_counts(base, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE", 0)
        monkeypatch.setattr(fingerprint, "SAMPLE", 64)
    file = base / "model.safetensors"
    before, tensors = digests(base), load_file(file)
    for name, tensor in tensors.items():
        # As one step of training would.
        other = {**tensors, name: tensor + 1e-3 * torch.sign(tensor) + 1e-3}
        save_file(other, file)
        after = digests(base)
        assert after["weights"] != before["weights"], name
        assert after["config"] == before["config"]
    save_file({**tensors, "lm_head.weight": tensors["model.norm.weight"].clone()}, file)
    assert digests(base)["weights"] != before["weights"]


def test_samples_reach_from_end_to_end():
    assert list(pieces(10, 20)) == [(10, 10)]
    found = list(pieces(100, 10_000_100))
    assert len(found) == fingerprint.SAMPLES
    assert found[0][0] == 100
    assert sum(found[-1]) == 10_000_100


def test_a_generated_base_has_none():
    assert base_digests(ModelConfig("generated:mlp")) == {}


def test_a_file_that_is_none_has_a_digest_too(base):
    before = digests(base)
    (base / "model.safetensors").write_bytes(b"no weights")
    assert digests(base)["weights"] != before["weights"]
