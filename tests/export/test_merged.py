from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qmemtune.config.adapters import LoraConfig, MethodConfig, QueryableConfig
from qmemtune.config.compose import Composed
from qmemtune.config.schema import Config
from qmemtune.engine.restore import load_run
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.export import export_run
from qmemtune.rundir import RunDir

IDS = torch.arange(10, 40).view(2, 15)
HEAD = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("architecture", "kind", "options"),
    [
        ("llama", "none", {"rslora": True}),
        ("llama", "none", {"dora": True}),
        ("llama", "nf4", {"dora": True}),
        ("llama", "nf4", {"target_modules": ["q_proj", "v_proj"]}),  # the others are dequantised too
        ("gpt2", "none", {}),
        ("gpt2", "nf4", {}),
    ],
)
def test_merged_lora_is_the_live_model(make_run, architecture: str, kind: str, options: dict[str, object]) -> None:
    run, config = make_run(LoraConfig(r=4, **options), architecture, kind)
    result = export_run(run, config)
    assert result["exact"] is True
    assert result["dtype"] == "float32"
    plain = AutoModelForCausalLM.from_pretrained(result["path"]).eval()
    live = load_run(run, config).model
    torch.testing.assert_close(logits(plain), logits(live), rtol=1e-4, atol=1e-4)
    with live.disable_adapter():
        assert not torch.allclose(logits(plain), logits(live), atol=0.1)
    fidelity = result["fidelity"]
    assert fidelity["kl_mean"] < 1e-6
    assert fidelity["loss_live"] == pytest.approx(fidelity["loss_exported"], abs=1e-4)
    assert fidelity["rows"] == 6


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base(make_run, init: str) -> None:
    run, config = make_run(LoraConfig(r=4, init=init))
    assert export_run(run, config)["fidelity"]["kl_mean"] < 1e-5


def test_int8_says_that_it_is_not_exact(make_run) -> None:
    result = export_run(*make_run(LoraConfig(r=4), kind="int8"))
    assert result["exact"] is False
    assert "8 bits" in result["note"]
    assert result["fidelity"]["kl_mean"] < 0.01


def test_tied_head_keeps_the_embeddings(make_run) -> None:
    run, config = make_run(LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), "qwen3")
    result = export_run(run, config)
    assert result["fidelity"]["kl_mean"] < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(result["path"])
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert torch.equal(plain.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(plain.lm_head.weight, base.lm_head.weight)


def trained(run: RunDir, config: Config) -> RunDir:
    """A run of two steps with the same config."""
    run = RunDir(run.path.with_name("trained"))
    config.run_dir, config.trainer.max_steps, config.optimizer.learning_rate = str(run.path), 2, 0.01
    train(Composed(config, {}, config.recipe))
    return run


def stored_in(adapter: Path) -> list[str]:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # a head of its own, and a tied one
def test_a_trained_update_of_the_head_is_saved_alone_and_merged(make_run, architecture: str) -> None:
    run, config = make_run(HEAD, architecture)
    run = trained(run, config)
    names = stored_in(run.adapter)
    assert any("lm_head" in name for name in names)
    assert all("lora_" in name for name in names)
    result = export_run(run, config)
    assert result["exact"] is True
    assert result["fidelity"]["kl_mean"] < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(result["path"])
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert torch.equal(plain.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(plain.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_an_adapter_that_holds_the_bases_own_head_is_merged(make_run, architecture: str) -> None:
    run, config = make_run(HEAD, architecture)
    load_run(run, config).model.save_pretrained(run.adapter)  # as PEFT does by itself
    assert any(name.endswith("lm_head.base_layer.weight") for name in stored_in(run.adapter))
    assert export_run(run, config)["fidelity"]["kl_mean"] < 1e-6


def test_a_head_that_is_trained_whole_is_saved(make_run) -> None:
    options = {"modules_to_save": "[lm_head]"}
    run, config = make_run(MethodConfig(method="dora", r=4, target_modules=["q_proj"], options=options))
    run = trained(run, config)
    assert "base_model.model.lm_head.weight" in stored_in(run.adapter)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert not torch.equal(logits(load_run(run, config).model), logits(base))


def test_untouched_weights_are_those_of_the_files(make_run) -> None:
    run, config = make_run(LoraConfig(r=4, target_modules=["q_proj"]))
    plain = AutoModelForCausalLM.from_pretrained(export_run(run, config)["path"]).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(config.model.path).state_dict().items():
        assert torch.equal(plain[name], weight) == ("q_proj" not in name)


@pytest.mark.parametrize(("setting", "expected"), [("auto", "bfloat16"), ("float32", "float32")])
def test_data_type_is_that_of_the_files_unless_named(make_run, setting: str, expected: str) -> None:
    run, config = make_run(LoraConfig(r=4), dtype=torch.bfloat16)
    config.export.dtype = setting
    result = export_run(run, config)
    assert result["dtype"] == expected
    assert str(AutoModelForCausalLM.from_pretrained(result["path"]).dtype) == f"torch.{expected}"
    # Only what is rounded to bfloat16 differs.
    assert result["fidelity"]["kl_mean"] < (1e-6 if expected == "float32" else 0.01)


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "none"), ("gpt2", "none"), ("gpt2", "nf4")])
def test_folding_constant_routes_is_exact(make_run, architecture: str, kind: str) -> None:
    # At temperature ~0 all routes are uniform: then, and only then, an average loses nothing.
    adapter = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, temperature=1e-9, init_core_std=0.3)
    run, config = make_run(adapter, architecture, kind)
    result = export_run(run, config)
    assert result["exact"] is False
    assert result["fidelity"]["kl_mean"] < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(result["path"]).eval()
    torch.testing.assert_close(logits(plain), logits(load_run(run, config).model), rtol=1e-4, atol=1e-4)


def test_folding_real_routes_is_measured(make_run) -> None:
    adapter = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, temperature=50.0, init_core_std=2.0)
    result = export_run(*make_run(adapter, kind="int8"))
    assert result["exact"] is False
    assert "static update" in result["note"]
    assert result["fidelity"]["kl_mean"] > 1e-4
    assert result["calibration"] == {"rows": 8, "fold": "mean"}


def test_loads_where_neither_peft_nor_qmemtune_exists(make_run, tmp_path: Path) -> None:
    run, config = make_run(LoraConfig(r=4), kind="nf4")
    path = export_run(run, config)["path"]
    script = (
        "import sys; sys.modules.update(peft=None, qmemtune=None, bitsandbytes=None)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m, t = AutoModelForCausalLM.from_pretrained({path!r}), AutoTokenizer.from_pretrained({path!r})\n"
        "ids = t.apply_chat_template([{'role': 'user', 'content': 'hi'}], return_tensors='pt', return_dict=True)\n"
        "print(m.generate(**ids, max_new_tokens=2, do_sample=False).shape[0], m.generation_config.eos_token_id)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "1"


def test_quantised_files_cannot_be_merged_into(make_run, tmp_path: Path) -> None:
    run, config = make_run(LoraConfig(r=4), kind="nf4")
    base = load_run(run, config).model.unload()
    base.save_pretrained(tmp_path / "stored")
    config.model.tokenizer, config.model.path = config.model.path, str(tmp_path / "stored")
    config.quantization.kind = "none"
    with pytest.raises(UserError, match="stored quantised"):
        export_run(run, config)
    assert not run.export.exists() or not any(run.export.iterdir())
    config.export.format = "lora"
    assert export_run(run, config)["fidelity"]["kl_mean"] < 1e-6


def test_exact_match_of_both_is_reported_where_the_run_measures_it(make_run) -> None:
    run, config = make_run(LoraConfig(r=4), format="merged")
    config.evaluation.exact_match.enabled = True
    config.evaluation.exact_match.max_new_tokens = 4
    # Every text holds an empty match: all answers count as equal, live and exported.
    config.evaluation.exact_match.answer_pattern = "^"
    found = export_run(run, config)["fidelity"]
    assert found["exact_match_live"] == found["exact_match_exported"] == 1.0
    assert found["exact_match_rows"] > found["rows"]
    card = (run.export / "merged" / "README.md").read_text(encoding="utf-8")
    assert "exact match (12 rows) | 100.0% | 100.0%" in card
