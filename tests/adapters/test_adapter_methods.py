"""Any PEFT method as an adapter: names, options, quantised bases."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PeftType
from transformers import AutoModelForCausalLM

from qmemtune.adapters import apply_adapter, check_method, describe
from qmemtune.adapters.methods import REASONS
from qmemtune.config.adapters import MethodConfig
from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.errors import UserError
from qmemtune.models.loading import load_base

METHODS = {
    "dora": {},
    "vera": {"d_initial": "0.1"},
    "vblora": {"num_vectors": "16", "vector_length": "8", "topk": "2"},
    "lily": {},
    "randlora": {},
}


def method(name, options=None, **more):
    return MethodConfig(method=name, options=options or {}, r=4, target_modules=["q_proj", "v_proj"], **more)


@pytest.mark.parametrize("name", METHODS)
def test_methods_adapt_and_learn(tiny_llama_dir, name):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model = apply_adapter(base, method(name, METHODS[name]), seed=0)
    assert describe(model)["adapted_layers"] == 8
    assert describe(model)["trainable_parameters"] < sum(p.numel() for p in base.parameters())
    ids = torch.arange(12)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (method("verra"), r"did you mean vera\?"),
        (method("lora"), "adapter=lora"),
        (method("adalora"), "training loop of its own"),
        (method("prefix_tuning"), "changes no layer"),
        (method("vera", {"d_inital": "0.1"}), r"did you mean d_initial\?"),
        (method("vera", {"d_initial": "much"}), "'much' is no float"),
        (method("vera", {"target_modules": "[k_proj]"}), r"set adapter\.target_modules"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(config, message):
    with pytest.raises(UserError, match=message):
        check_method(config)


def test_common_options_that_a_method_lacks_are_named():
    assert check_method(method("vera", dropout=0.1)) == []
    assert check_method(method("ia3", {"feedforward_modules": "[]"}, alpha=2.0)) == [
        "adapter.r has no effect: ia3 has none",
        "adapter.alpha has no effect: ia3 has none",
    ]


@pytest.mark.parametrize(
    "config",
    [
        MethodConfig(method="ia3"),
        MethodConfig(method="oft", r=4),
        MethodConfig(method="oft", options={"oft_block_size": "8"}),
        MethodConfig(method="lily", r=4),
    ],
    ids=lambda config: config.method,
)
def test_all_linear_layers_are_saved_so_that_they_load(tiny_llama_dir, tmp_path, config):
    model = apply_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), config, seed=0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_targets_with_which_a_method_would_not_load_are_refused(tiny_llama_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    config = MethodConfig(method="ia3", target_modules=["model.layers.0.mlp.down_proj"])
    with pytest.raises(UserError, match=r"ia3 could not be loaded again .* such as \[q_proj, v_proj\]"):
        apply_adapter(base, config, seed=0)


@pytest.mark.parametrize("name", sorted(set(REASONS) & set(PeftType.__members__)))
def test_methods_that_no_run_can_have_are_not_offered(name):
    with pytest.raises(UserError, match=f"{name.lower()} is no adapter of layers"):
        check_method(method(name.lower()))


@pytest.mark.parametrize("name", ["vera", "lily"])
def test_what_adds_to_a_quantised_layer_is_taken(tiny_llama_dir, name):
    base = load_base(ModelConfig(path=str(tiny_llama_dir), compute_dtype="float32"), QuantizationConfig(kind="nf4"))
    model = apply_adapter(base, method(name, METHODS[name]), seed=0)
    assert all(p.grad is None for p in model.parameters())
    model(torch.arange(5)[None]).logits.sum().backward()


def test_what_reads_a_quantised_weight_is_refused_with_the_reason(tiny_llama_dir):
    base = load_base(ModelConfig(path=str(tiny_llama_dir), compute_dtype="float32"), QuantizationConfig(kind="nf4"))
    with pytest.raises(UserError, match=r"hra cannot adapt this base .*quantization=none"):
        apply_adapter(base, method("hra"), seed=0)
