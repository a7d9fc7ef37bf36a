"""Saved and loaded, copied and pickled, an adapter gives the same logits; the memory is stored once."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from qmemtune.adapters import QueryableMemoryConfig
from qmemtune.adapters.queryable import QUERYABLE


@pytest.fixture
def saved(family, tmp_path):
    """A stirred model and the folder it was saved into."""
    model = family.adapted(instruction_prior=0.5, top_k=4)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding: weights that stay where a file was mapped lie at other addresses, and some processors'
    products sum in an order that depends on that."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_gives_the_same_logits(family, saved, low_cpu_mem_usage):
    model, folder = saved
    ids = family.tokens(3, 9)
    loaded = PeftModel.from_pretrained(family.base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    of_model, of_loaded = model.state_dict(), loaded.state_dict()
    assert of_model.keys() == of_loaded.keys()
    assert all(torch.equal(of_model[name], of_loaded[name]) for name in of_model)
    close(family.logits(loaded, ids), family.logits(model, ids))
    assert not any(p.is_meta for p in loaded.parameters())
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = PeftModel.from_pretrained(family.base(), folder, is_trainable=True).train()
    family.loss(trained, ids).backward()
    assert any("queryable_core" in name for name in family.gradients(trained))


def test_atoms_are_stored_once(family, saved):
    model, folder = saved
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    memory = [name for name in shapes if "adapter_memory" in name]
    assert sorted(name.rpartition(".")[2] for name in memory) == [
        "mean_0",
        "mean_1",
        "queryable_block",
        "queryable_core",
        "queryable_key",
        "queryable_prior_key",
        "queryable_prior_projection",
        "queryable_query",
        "queryable_summary",
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(torch.Size(shape).numel() for name, shape in shapes.items() if "mean_" not in name) == trained


def test_config_keeps_every_option(llama, saved):
    loaded = PeftConfig.from_pretrained(saved[1])
    assert isinstance(loaded, QueryableMemoryConfig)
    assert loaded.peft_type == QUERYABLE
    original = saved[0].peft_config["default"]
    for name in ("r", "alpha", "num_atoms", "key_dim", "block_size", "top_k", "temperature", "target_modules"):
        assert getattr(loaded, name) == getattr(original, name), name
    assert loaded.prior_dim == 32
    assert loaded.inference_mode


def test_a_fresh_process_loads_it(llama, family_dirs, tmp_path):
    """After ``import qmemtune.adapters`` PEFT knows the method, in any process."""
    model, ids = llama.adapted(), llama.tokens(2, 7)
    model.save_pretrained(tmp_path)
    torch.save((ids, llama.logits(model, ids)), tmp_path / "expected.pt")
    script = f"""
import torch, qmemtune.adapters
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
base = AutoModelForCausalLM.from_pretrained({str(family_dirs("llama"))!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(tmp_path)!r})
with torch.no_grad():
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_transformers_loads_it_too(family, saved, family_dirs):
    """transformers' own way of loading an adapter, without a PeftModel."""
    model, folder = saved
    ids = family.tokens(2, 8)
    expected = family.logits(model, ids)
    base = AutoModelForCausalLM.from_pretrained(family_dirs(family.name), dtype=torch.float32)
    base.load_adapter(str(folder))
    close(family.logits(base, ids), expected)
    base.disable_adapters()
    close(family.logits(base, ids), family.logits(family.base(), ids))
    base.enable_adapters()
    close(family.logits(base, ids), expected)


def test_transformers_loads_base_and_adapter_from_the_adapters_folder(llama, family_dirs, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(family_dirs("llama"), dtype=torch.float32)
    model, ids = llama.adapted(base=base), llama.tokens(2, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(llama.logits(loaded, ids), llama.logits(model, ids))
    done = loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(done, model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))


def test_modules_to_save_travel_along(llama, tmp_path):
    model, ids = llama.adapted(modules_to_save=["lm_head"]), llama.tokens(2, 8)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.base(), tmp_path)
    assert torch.equal(llama.logits(loaded, ids), llama.logits(model, ids))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_are_independent(llama, checkpointing):
    """A deep copy and a pickled copy compute the same and share nothing, memory and hooks included."""
    model, ids = llama.adapted().train(), llama.tokens(2, 8)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    llama.loss(model, ids).backward()
    expected_gradients = llama.gradients(model)
    expected = llama.logits(model, ids)
    others = [copy.deepcopy(model)]
    if not checkpointing:  # transformers' own hook for it cannot be pickled
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others.append(torch.load(file, weights_only=False))
    for other in others:
        assert torch.equal(llama.logits(other, ids), expected)
        llama.loss(other, ids).backward()
        found = llama.gradients(other)
        assert all(torch.equal(found[name], value) for name, value in expected_gradients.items())
        assert llama.memory(other) is not llama.memory(model)
        llama.stir(other, seed=9)
        assert not torch.allclose(llama.logits(other, ids), expected, atol=1e-2)
        assert torch.equal(llama.logits(model, ids), expected)
