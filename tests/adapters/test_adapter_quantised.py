"""4-bit and 8-bit bases run through the same layer code, and an evaluation between two steps changes no gradient."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn import modules as bnb_modules
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from qmemtune.adapters.queryable.layer import QueryableLinear

QUANTISED = [(name, "nf4") for name in ("llama", "qwen3", "gemma3", "mistral")] + [("llama", "int8")]


@pytest.fixture(params=QUANTISED, ids=["-".join(pair) for pair in QUANTISED])
def base(request, quantised):
    return quantised(*request.param)


def test_start_equals_the_quantised_base(llama, base):
    ids = llama.tokens(3, 9)
    expected = llama.logits(base, ids)
    model = llama.adapted(base=base, stirred=False)
    layers = [m for m in model.modules() if isinstance(m, QueryableLinear)]
    assert layers
    assert all(isinstance(layer.base_layer, (Linear4bit, Linear8bitLt)) for layer in layers)
    assert torch.equal(llama.logits(model, ids), expected)


def test_train_evaluate_train_on_a_quantised_base(llama, base):
    model, ids = llama.adapted(base=base).train(), llama.tokens(3, 9)

    def step():
        llama.loss(model, ids).backward()
        return llama.gradients(model)

    expected = step()
    model.eval()
    before = llama.logits(model, ids)
    model.generate(input_ids=llama.tokens(2, 3), max_new_tokens=3)
    model.train()
    found = step()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = step()
    for name in expected:
        torch.testing.assert_close(checkpointed[name], expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(llama.logits(model.eval(), ids), before)


def test_without_atoms_it_is_lora_on_nf4(llama, quantised):
    ours = llama.adapted(base=quantised("llama"))
    lora = get_peft_model(
        quantised("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        llama.memory(ours).queryable_core["default"].zero_()
    theirs = dict(lora.named_parameters())
    for name, parameter in ours.named_parameters():
        if "queryable_A" in name or "queryable_B" in name:
            theirs[name.replace("queryable_", "lora_")].data.copy_(parameter.data)
    ids = llama.tokens(3, 9)
    torch.testing.assert_close(llama.logits(ours, ids), llama.logits(lora, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_no_4bit_layer_repacks_itself(llama, quantised, targets):
    """Also those that are not adapted: gradients of the layers below pass through them."""
    base = quantised("llama")
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on such a processor
    model = llama.adapted(base=base, target_modules=targets)
    found = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(found) == 28
    assert not any(found)


def test_an_evaluation_packs_nothing_where_the_processor_would(llama, quantised, monkeypatch):
    """With a processor that packs, simulated: the weights stay as they are and so do the gradients."""

    def pack(*args, **kwargs):
        raise AssertionError("a 4-bit weight was packed")

    monkeypatch.setattr(bnb_modules, "_convert_weight_packed_for_cpu", pack)
    base = quantised("llama")
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as bitsandbytes sets it on such a processor
    with pytest.raises(AssertionError):
        llama.logits(base, llama.tokens(1, 4))
    model, ids = llama.adapted(base=base, target_modules=["v_proj"]).train(), llama.tokens(2, 8)
    llama.loss(model, ids).backward()
    expected = llama.gradients(model)
    llama.logits(model.eval(), ids)
    llama.loss(model.train(), ids).backward()
    found = llama.gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_packed_base_is_refused(llama, quantised):
    """A base that was evaluated before, where bitsandbytes packs: its products have no gradient any more."""
    base = quantised("llama")
    base.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="load the base model again"):
        llama.adapted(base=base)


def test_prepared_for_kbit_training(llama, quantised):
    base = prepare_model_for_kbit_training(quantised("llama"), gradient_checkpointing_kwargs={"use_reentrant": False})
    model, ids = llama.adapted(base=base).train(), llama.tokens(2, 8)
    llama.loss(model, ids).backward()
    assert llama.gradients(model)


def test_prepared_with_the_reentrant_default_is_refused(llama, quantised):
    model = llama.adapted(base=prepare_model_for_kbit_training(quantised("llama"))).train()
    with pytest.raises(ValueError, match="use_reentrant"):
        llama.loss(model, llama.tokens(2, 8))
