"""The study variants: a route a row, atoms of each block, a generated operator."""

from __future__ import annotations

import pytest
import torch

from qmemtune.adapters import prompts_of
from qmemtune.errors import UserError


@pytest.mark.parametrize(
    "options", [{"granularity": "row"}, {"shared_atoms": False}, {"generated_core": True}], ids=lambda o: next(iter(o))
)
def test_starts_as_the_base_trains_whole_and_is_causal(llama, options):
    base, ids = llama.base(), llama.tokens(2, 8)
    prompt = torch.arange(8).expand(2, 8) < 3
    fresh = llama.adapted(stirred=False, base=llama.base(), **options)
    with llama.memory(fresh).prompted(prompt):
        assert torch.equal(llama.logits(fresh, ids), llama.logits(base, ids))
    model = llama.adapted(**options)
    memory = llama.memory(model)
    with memory.prompted(prompt):
        llama.loss(model.train(), ids).backward()
        assert all(gradient.abs().max() > 0 for gradient in llama.gradients(model).values())
        expected = llama.logits(model.eval(), ids)
        changed = ids.clone()
        changed[:, 5] += 1
        torch.testing.assert_close(llama.logits(model, changed)[:, :5], expected[:, :5], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(llama.logits(model, changed)[:, 5:], expected[:, 5:])


def test_same_parameters_as_the_memory_itself(llama):
    sizes = {
        sum(p.numel() for p in llama.adapted(**options).parameters() if p.requires_grad)
        for options in ({}, {"granularity": "row"}, {"shared_atoms": False}, {"generated_core": True})
    }
    assert len(sizes) == 1


def test_a_row_has_one_route_from_its_prompt(llama):
    model, ids = llama.adapted(granularity="row"), llama.tokens(2, 8)
    labels = ids.clone()
    labels[0, :3], labels[1, :5] = -100, -100
    with prompts_of(model, labels, -100):
        routes = llama.routes(model, ids)
        changed = ids.clone()
        changed[:, 5:] += 1
        for block, route in llama.routes(model, changed).items():
            assert torch.equal(route, route[:, :1].expand_as(route))
            torch.testing.assert_close(route, routes[block])
    with pytest.raises(UserError, match="prompt"):
        llama.logits(model, ids)


def test_each_block_has_its_own_atoms(llama):
    routes = llama.routes(llama.adapted(shared_atoms=False), llama.tokens(2, 8))
    for block, route in routes.items():
        own = slice(block * 3, block * 3 + 3)
        torch.testing.assert_close(route[..., own].sum(dim=-1), torch.ones(route.shape[:-1]))
    with pytest.raises(ValueError, match="multiple"):
        llama.adapted(shared_atoms=False, num_atoms=7)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"instruction_prior": 1.0}])
def test_a_generated_operator_has_no_route(llama, options):
    with pytest.raises(ValueError, match="generated_core"):
        llama.config(generated_core=True, **options)
