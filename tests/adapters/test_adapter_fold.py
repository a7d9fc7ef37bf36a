"""Folding: with cores that are all alike, routing has no effect and the folded LoRA is exact."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qmemtune.adapters.queryable.fold import mean_fold, mean_routes


def test_equal_cores_fold_exactly_into_lora(family):
    model, ids = family.adapted(alpha=6.0), family.tokens(3, 9)
    core = family.memory(model).queryable_core["default"]
    with torch.no_grad():
        core.copy_(core[:1].expand_as(core).clone())
    folded = mean_fold(model, [lambda: model(input_ids=ids)])
    lora = get_peft_model(
        family.base(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    assert set(folded) == set(lora.base_model.targeted_module_names)
    for path, layer in folded.items():
        target = lora.base_model.model.get_submodule(path)
        target.lora_A["default"].weight.data.copy_(layer.lora_A)
        target.lora_B["default"].weight.data.copy_(layer.lora_B)
        assert target.scaling["default"] == layer.scaling == 1.5
    torch.testing.assert_close(family.logits(lora, ids), family.logits(model, ids), rtol=1e-5, atol=1e-5)


def test_mean_routes_leave_padding_out(family):
    model = family.adapted(top_k=4)
    short, long = family.tokens(1, 5, seed=5), family.tokens(1, 9, seed=9)
    ids = torch.cat([torch.nn.functional.pad(short, (0, 4)), long])
    mask = (ids != 0).long()
    batched = mean_routes(model, [lambda: model(input_ids=ids, attention_mask=mask)])
    alone = mean_routes(model, [lambda: model(input_ids=short), lambda: model(input_ids=long)])
    assert sorted(batched) == sorted(alone) == [0, 1]
    for block, route in batched.items():
        torch.testing.assert_close(route, alone[block], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(route.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert family.memory(model).observer is None


def test_only_the_active_adapter_is_folded(llama):
    model, ids = llama.adapted(), llama.tokens(2, 6)
    model.add_adapter("second", llama.config(r=2, num_atoms=3, block_size=1))
    model.set_adapter("second")
    folded = mean_fold(model, [lambda: model(input_ids=ids)])
    assert {layer.lora_A.shape[0] for layer in folded.values()} == {2}


def test_errors(llama):
    with pytest.raises(ValueError, match="no queryable memory"):
        mean_fold(llama.base(), [])
    with pytest.raises(ValueError, match="no calibration token"):
        mean_routes(llama.adapted(), [])
