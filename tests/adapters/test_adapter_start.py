"""At the start the model is its base; without atoms it is LoRA; the routed operator is bounded by the atoms'."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from qmemtune.adapters.queryable import QueryableMemoryConfig
from qmemtune.adapters.queryable.routing import top_k_softmax


@pytest.mark.parametrize("training", [False, True])
def test_start_equals_base_bit_for_bit(family, training):
    base, model = family.base().train(training), family.adapted(stirred=False, instruction_prior=1.0).train(training)
    ids = family.tokens(3, 11)
    assert torch.equal(family.logits(model, ids), family.logits(base, ids))
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_start_equals_base_under_autocast(llama):
    base, model, ids = llama.base(), llama.adapted(stirred=False), llama.tokens(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(llama.logits(model, ids), llama.logits(base, ids))


def test_without_atoms_it_is_lora(family):
    """Zero cores and the same A and B: the logits and the gradients of PEFT's LoRA."""
    ours = family.adapted(alpha=6.0)
    lora = get_peft_model(
        family.base(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        family.memory(ours).queryable_core["default"].zero_()
    factors = {n: p for n, p in ours.named_parameters() if "queryable_A" in n or "queryable_B" in n}
    theirs = {n: p for n, p in lora.named_parameters() if "lora_" in n}
    assert len(factors) == len(theirs) > 0
    for name, parameter in factors.items():
        theirs[name.replace("queryable_", "lora_")].data.copy_(parameter.data)

    ids = family.tokens(3, 11)
    torch.testing.assert_close(family.logits(ours, ids), family.logits(lora, ids), rtol=1e-5, atol=1e-5)
    for model in (ours, lora):
        family.loss(model, ids).backward()
    ours_gradients, theirs_gradients = family.gradients(ours), family.gradients(lora)
    for name in factors:
        torch.testing.assert_close(
            ours_gradients[name], theirs_gradients[name.replace("queryable_", "lora_")], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("top_k", [None, 1, 2, 6])
def test_routes_are_convex(family, top_k):
    """Weights are non-negative and sum to one, all but ``top_k`` are exactly zero, and so the operator is bounded."""
    model = family.adapted(top_k=top_k)
    memory = family.memory(model)
    core = memory.cores("default", memory.queryable_core["default"]).detach()
    eye = torch.eye(core.shape[-1])
    bound = torch.linalg.matrix_norm(eye + core, ord=2).max()
    routes = family.routes(model, family.tokens(3, 11))
    assert sorted(routes) == [0, 1]
    for route in routes.values():
        assert route.shape == (3, 11, 6)
        assert (route >= 0).all()
        torch.testing.assert_close(route.sum(dim=-1), torch.ones(3, 11))
        if top_k is not None and top_k < 6:
            assert ((route == 0).sum(dim=-1) == 6 - top_k).all()
        operator = eye + torch.einsum("btm,mrs->btrs", route, core)
        assert torch.linalg.matrix_norm(operator, ord=2).max() <= bound * (1 + 1e-5)
        assert route.std(dim=(0, 1)).mean() > 0.05, "the routes hardly vary: this test would prove nothing"


def test_routes_differ_between_blocks_and_follow_the_depth_summary(llama):
    ids = llama.tokens(2, 9)
    model = llama.adapted(block_size=1)
    routes = llama.routes(model, ids)
    assert len(routes) == 4
    assert not torch.allclose(routes[1], routes[2], atol=1e-2)
    with torch.no_grad():
        llama.memory(model).queryable_summary["default"].mul_(2)
    changed = llama.routes(model, ids)
    assert torch.equal(changed[0], routes[0]), "the first block has no summary"
    assert not torch.allclose(changed[1], routes[1], atol=1e-3)
    without = llama.memory(llama.adapted(depth_summary=False))
    assert "default" not in without.queryable_summary


def test_normed_routes_cannot_run_away(family):
    """However large queries and keys grow, no atom takes more than the bounded logits allow."""
    weights = {}
    for normed in (True, False):
        model = family.adapted(router_norm=normed, temperature=1.0)
        memory = family.memory(model)
        with torch.no_grad():
            for parameter in (memory.queryable_key, memory.queryable_query):
                parameter["default"].mul_(100)
        routes = family.routes(model, family.tokens(3, 11))
        weights[normed] = max(route.max().item() for route in routes.values())
    atoms, bound = memory.configs["default"].num_atoms, math.sqrt(memory.configs["default"].key_dim)
    assert weights[True] <= 1 / (1 + (atoms - 1) * math.exp(-2 * bound)) + 1e-6
    assert weights[False] > 0.999, "without the norm the routes are as sharp as can be"
    assert weights[True] < 0.99


@pytest.mark.parametrize("shared", [True, False])
def test_what_all_atoms_share_has_no_effect(llama, shared):
    """With centred cores, and atoms shared or not, a part that all atoms of a route have in common is taken out."""
    options = {"num_atoms": 6, "block_size": 2, "shared_atoms": shared}
    ids = llama.tokens(2, 7)
    for center in (True, False):
        model = llama.adapted(center_cores=center, **options)
        before = llama.logits(model, ids)
        with torch.no_grad():
            llama.memory(model).queryable_core["default"].add_(torch.randn(4, 4))
        assert torch.allclose(llama.logits(model, ids), before, atol=1e-4) == center


def test_adapters_older_than_an_option_are_as_they_were():
    new = QueryableMemoryConfig(r=4)
    assert (new.router_norm, new.center_cores) == (True, True)
    saved = {k: v for k, v in new.to_dict().items() if k not in ("router_norm", "center_cores")}
    older = PeftConfig.from_peft_type(**saved)
    assert (older.router_norm, older.center_cores) == (False, False)
    again = PeftConfig.from_peft_type(**new.to_dict())
    assert (again.router_norm, again.center_cores) == (True, True)


def test_top_k_softmax_keeps_exactly_k_on_ties():
    weights = top_k_softmax(torch.zeros(5, 4), 2)
    assert ((weights > 0).sum(dim=-1) == 2).all()
    assert torch.equal(weights.sum(dim=-1), torch.ones(5))
