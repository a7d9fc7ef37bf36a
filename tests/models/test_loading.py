from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.errors import UserError
from qmemtune.models.loading import load_base, load_tokenizer

NONE = QuantizationConfig()
IDS = torch.arange(1, 25).view(2, 12)
ARCHITECTURES = ("llama", "qwen3", "gemma", "mistral", "gpt2")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_base_equals_transformers(model_folder: Callable[[str], Path], name: str) -> None:
    folder = model_folder(name)
    model = load_base(ModelConfig(path=str(folder), compute_dtype="float32"), NONE)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits, rtol=0, atol=0
        )
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantised_base_runs_both_ways(model_folder: Callable[[str], Path], name: str, kind: str) -> None:
    plain = load_base(ModelConfig(path=str(model_folder(name))), NONE)
    model = load_base(ModelConfig(path=str(model_folder(name))), QuantizationConfig(kind=kind))
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(layers) == (8 if name == "gpt2" else 14)
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert not any(p.requires_grad for p in model.parameters())

    def loss_and_gradient(base: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = base.get_input_embeddings()(IDS).detach().requires_grad_()
        loss = base(inputs_embeds=inputs, labels=IDS).loss
        loss.backward()
        return loss.detach(), inputs.grad

    (loss, gradient), (expected, reference) = loss_and_gradient(model), loss_and_gradient(plain)
    assert abs(loss - expected) < 0.05
    # 4 bits move the weights by some tenths of their size: the direction must stay.
    assert torch.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > (0.99 if kind == "int8" else 0.8)


def test_compute_dtype_is_that_of_weights(model_folder: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(model_folder("llama")), compute_dtype="bfloat16")
    assert load_base(config, NONE).dtype == torch.bfloat16
    layer = load_base(config, QuantizationConfig("nf4")).model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16


def test_weights_that_do_not_fit_the_config_are_refused(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"9 are missing.*layers\.2\."):
        load_base(ModelConfig(path=str(folder)), NONE)


def test_damaged_weights(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_base(ModelConfig(path=str(folder)), NONE)


def test_unknown_hub_model_offline() -> None:
    with pytest.raises(UserError, match="cannot be reached") as caught:
        load_base(ModelConfig(path="nobody/nothing-at-all"), NONE)
    assert "model.path=" in (caught.value.findings[0].fix or "")
    with pytest.raises(UserError, match="cannot be reached"):
        load_tokenizer(ModelConfig(path="nobody/nothing-at-all"))


def test_code_of_the_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "homemade",
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            }
        )
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_base(ModelConfig(path=str(tmp_path)), NONE)
    assert "model.trust_remote_code=true" in (caught.value.findings[0].fix or "")


def test_not_a_causal_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a causal language model"):
        load_base(ModelConfig(path=str(tmp_path)), NONE)


def test_quantised_folder_is_not_quantised_again(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    nf4 = QuantizationConfig("nf4")
    load_base(ModelConfig(path=str(model_folder("llama"))), nf4).save_pretrained(tmp_path)
    again = load_base(ModelConfig(path=str(tmp_path)), NONE)
    assert any(type(m).__name__ == "Linear4bit" for m in again.modules())
    with pytest.raises(UserError, match="quantised already"):
        load_base(ModelConfig(path=str(tmp_path)), nf4)


def test_missing_bitsandbytes(model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmemtune.models.bitsandbytes.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        load_base(ModelConfig(path=str(model_folder("llama"))), QuantizationConfig("nf4"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the process's mappings from /proc")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_lets_go_of_its_files(model_folder: Callable[[str], Path], kind: str) -> None:
    # Embeddings in the type in which they are stored would keep all pages of the mapped file in the process.
    folder = model_folder("llama")
    model = load_base(ModelConfig(path=str(folder), compute_dtype="float32"), QuantizationConfig(kind=kind))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.get_input_embeddings().weight, stored.get_input_embeddings().weight)
    if stored.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
