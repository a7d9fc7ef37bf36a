"""Folding: with cores that are all alike, routing has no effect and the folded LoRA is exact."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qmemtune.adapters.queryable.fold import FoldedLayer, least_squares_fold, mean_fold, mean_routes, resized


def test_equal_cores_fold_exactly_into_lora(family):
    model, ids = family.adapted(alpha=6.0, center_cores=False), family.tokens(3, 9)
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


def test_least_squares_is_the_best_static_operator_of_its_tokens(llama):
    model, ids = llama.adapted(num_atoms=4, temperature=4.0), llama.tokens(3, 9)
    with torch.no_grad():
        llama.memory(model).queryable_core["default"].normal_(std=1.0)

    def error(folded: dict[str, FoldedLayer]) -> float:
        """Sum over layers of |B (C(x) z - C z)|^2."""
        total, hooks = [], []
        for path, factors in folded.items():
            layer = model.base_model.model.get_submodule(path)

            def compare(layer, args, output, factors=factors):
                live = output - layer.base_layer(args[0])
                static = factors.scaling * args[0] @ factors.lora_A.T @ factors.lora_B.T
                total.append((live - static).square().sum().item())

            hooks.append(layer.register_forward_hook(compare))
        with torch.no_grad():
            model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        return sum(total)

    forwards = [lambda: model(input_ids=ids[:1]), lambda: model(input_ids=ids[1:])]
    best, mean = least_squares_fold(model, forwards, ridge=1e-9), mean_fold(model, forwards)
    assert best.keys() == mean.keys()
    assert error(best) < 0.8 * error(mean)


def test_least_squares_leaves_padding_out_and_is_exact_for_equal_cores(llama):
    model = llama.adapted(alpha=6.0, center_cores=False)
    short, long = llama.tokens(1, 5, seed=5), llama.tokens(1, 9, seed=9)
    ids = torch.cat([torch.nn.functional.pad(short, (0, 4)), long])
    batched = least_squares_fold(model, [lambda: model(input_ids=ids, attention_mask=(ids != 0).long())])
    alone = least_squares_fold(model, [lambda: model(input_ids=short), lambda: model(input_ids=long)])
    for path, layer in batched.items():
        torch.testing.assert_close(layer.lora_A, alone[path].lora_A, rtol=1e-3, atol=1e-4)
    core = llama.memory(model).queryable_core["default"]
    with torch.no_grad():
        core.copy_(core[:1].expand_as(core).clone())
    forwards = [lambda: model(input_ids=llama.tokens(8, 12))]
    exact = mean_fold(model, forwards)
    for path, layer in least_squares_fold(model, forwards, ridge=1e-9).items():
        torch.testing.assert_close(layer.lora_A, exact[path].lora_A, rtol=1e-3, atol=1e-3)


def test_another_rank_is_the_same_update_or_the_nearest():
    torch.manual_seed(0)
    layer = FoldedLayer(torch.randn(4, 10), torch.randn(7, 4), 2.0)
    generator = torch.Generator().manual_seed(0)
    larger, smaller = resized(layer, 6, generator=generator), resized(layer, 2, generator=generator)
    assert larger.lora_A.shape == (6, 10)
    update = layer.lora_B @ layer.lora_A
    torch.testing.assert_close(larger.lora_B @ larger.lora_A, update)
    u, s, v = torch.linalg.svd(update)
    torch.testing.assert_close(smaller.lora_B @ smaller.lora_A, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ValueError, match="no queryable memory"):
        least_squares_fold(llama.base(), [])
    with pytest.raises(ValueError, match="no calibration token"):
        least_squares_fold(llama.adapted(), [])
