from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.engine.restore import load_run
from qmemtune.export import export_run

IDS = torch.arange(10, 40).view(2, 15)
FOLDED = QueryableConfig(r=4, alpha=6.0, num_atoms=3, key_dim=4, block_size=2, temperature=1e-9, init_core_std=0.3)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("format", ["live", "lora"])
def test_lora_run_is_copied(make_run, format: str) -> None:
    run, config = make_run(LoraConfig(r=4), format=format)
    result = export_run(run, config)
    assert result["exact"] is True
    assert result["fidelity"]["kl_mean"] == 0.0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), result["path"])
    assert torch.equal(logits(model.eval()), logits(load_run(run, config).model))


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_memory_as_trained_is_exact(make_run, kind: str) -> None:
    adapter = QueryableConfig(
        r=4, num_atoms=3, key_dim=4, block_size=2, temperature=20.0, instruction_prior=2.0, init_core_std=1.0
    )
    result = export_run(*make_run(adapter, kind=kind, format="live"))
    assert result["exact"] is True
    assert "calibration" not in result
    # With the instructions of the rows: without them the prior alone would move the routes.
    assert result["fidelity"]["kl_mean"] < 1e-9


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ["all-linear"]), ("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])]
)
def test_folded_memory_is_a_standard_lora(make_run, architecture: str, targets: list[str]) -> None:
    FOLDED.target_modules = targets
    run, config = make_run(FOLDED, architecture, format="lora")
    result = export_run(run, config)
    saved = PeftLoraConfig.from_pretrained(result["path"])
    assert saved.peft_type == "LORA"
    assert (saved.r, saved.lora_alpha) == (4, 6.0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.path), result["path"])
    live = load_run(run, config).model
    torch.testing.assert_close(logits(plain.eval()), logits(live), rtol=1e-4, atol=1e-4)
    assert result["exact"] is False
    assert result["fidelity"]["kl_mean"] < 1e-6


def test_folded_lora_of_some_layers_adapts_no_others(make_run) -> None:
    adapter = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, layers_to_transform=[1, 3], temperature=1e-9)
    run, config = make_run(adapter, format="lora")
    result = export_run(run, config)
    targets = PeftLoraConfig.from_pretrained(result["path"]).target_modules
    assert all(".layers.1." in name or ".layers.3." in name for name in targets)
    assert result["fidelity"]["kl_mean"] < 1e-6


def test_base_is_named_without_its_place(make_run) -> None:
    run, config = make_run(LoraConfig(r=4), format="live")
    saved = json.loads((Path(export_run(run, config)["path"]) / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == Path(config.model.path).name
