"""Queries that read a sketch of their block's input: measured once, in the first training pass, saved with the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from qmemtune.adapters import QueryableMemoryConfig
from qmemtune.adapters.queryable.sketch import InputSketch, sketch_matrix

CPU = torch.device("cpu")
SIZE = 12


def sketch(blocks: int = 1) -> InputSketch:
    made = InputSketch(SIZE)
    for _ in range(blocks):
        made.add_block()
    return made


def inputs(rows: int = 40, seed: int = 0) -> torch.Tensor:
    """Tokens that have much in common, and features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    varied = torch.randn(rows, 3, 32, generator=generator) * torch.logspace(-1, 1, 32)
    return varied + 20 * torch.randn(32, generator=torch.Generator().manual_seed(99))


def test_each_input_goes_with_a_sign_into_one_sum_the_same_for_ever():
    matrix = sketch_matrix(40, SIZE, torch.float32, CPU)
    assert (matrix.abs().sum(0) == 1).all()
    assert (matrix != 0).sum(1).min() > 0
    assert 10 < (matrix == 1).sum() < 30
    places = [(int(column.abs().argmax()), int(column.sum())) for column in matrix.T[:6]]
    # Adapters that are saved rely on these.
    assert places == [(3, 1), (8, 1), (11, -1), (10, 1), (5, -1), (1, -1)]


def test_the_first_training_pass_centres_and_scales():
    made, x = sketch(2), inputs()
    assert not made(0, x, None, measure=False).any()
    features = made(0, x, None, measure=True).flatten(0, 1)
    torch.testing.assert_close(features.mean(0), torch.zeros(SIZE), rtol=0, atol=1e-4)
    # Less than one for what varied little beside the rest.
    assert (features.std(0, correction=0) < 1.0001).all()
    assert features.std(0).max() > 0.9
    assert not made(1, x, None, measure=False).any()


def test_later_passes_are_measured_by_the_first():
    made = sketch()
    first = made(0, inputs(seed=0), None, measure=True)
    assert made(0, inputs(seed=1), None, measure=True).mean(dim=(0, 1)).abs().max() > 0.05
    assert torch.equal(made(0, inputs(seed=0), None, measure=False), first)


def test_padding_is_not_measured():
    x, mask = inputs(), torch.ones(40, 3, dtype=torch.long)
    padded = torch.cat([x, torch.full((40, 2, 32), 1e3)], dim=1)
    masked, plain = sketch(), sketch()
    found = masked(0, padded, torch.cat([mask, torch.zeros_like(mask)[:, :2]], dim=1), measure=True)
    torch.testing.assert_close(found[:, :3], plain(0, x, None, measure=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", [float("inf"), float("nan")])
def test_a_pass_with_overflow_measures_nothing(damage):
    made, x = sketch(), inputs()
    broken = x.clone()
    broken[0, 0, 0] = damage
    made(0, broken, None, measure=True)
    assert not made.inverse_std.any()
    # One token has no deviation.
    made(0, x[:1, :1], None, measure=True)
    assert not made.inverse_std.any()
    made(0, x, None, measure=True)
    assert made.inverse_std.all()


def test_only_training_measures(family):
    model, ids = family.adapted(stirred=False, query_sketch=SIZE), family.tokens(3, 9)
    statistics = family.memory(model).queryable_input["default"]
    family.logits(model.train(), ids)
    family.loss(model.eval(), ids)
    assert not statistics.inverse_std.any()
    family.loss(model.train(), ids)
    assert statistics.inverse_std.all()
    before = copy.deepcopy(statistics.state_dict())
    family.loss(model, family.tokens(3, 9, seed=4))
    assert all(torch.equal(before[name], value) for name, value in statistics.state_dict().items())


def test_routes_differ_from_token_to_token_at_once(llama):
    """What it is for: the routes of an untrained memory hardly differ where queries read the low-rank state."""
    spread = {}
    for size in (0, SIZE):
        model = llama.adapted(stirred=False, query_sketch=size, block_size=1).train()
        ids = llama.tokens(8, 20)
        llama.loss(model, ids)
        routes = llama.routes(model.eval(), ids)
        spread[size] = sum(float(route.std(dim=(0, 1)).mean()) for route in routes.values())
    assert spread[SIZE] > spread[0]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(family, tmp_path, low_cpu_mem_usage):
    model, ids = family.adapted(query_sketch=SIZE), family.tokens(3, 9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(family.logits(loaded, ids), family.logits(model, ids))
    statistics = family.memory(loaded).queryable_input["default"]
    assert not statistics.mean.is_meta
    assert torch.equal(statistics.mean, family.memory(model).queryable_input["default"].mean)


def test_an_adapter_beside_it_and_deleting(llama):
    model, ids = llama.adapted(query_sketch=SIZE), llama.tokens(2, 8)
    expected = llama.logits(model, ids)
    model.add_adapter("second", llama.config(query_sketch=SIZE + 4))
    assert torch.equal(llama.logits(model, ids), expected)
    model.set_adapter("second")
    assert not any(buffer.requires_grad for buffer in model.buffers())
    model.delete_adapter("second")
    assert set(llama.memory(model).queryable_input) == {"default"}
    model.set_adapter("default")
    assert torch.equal(llama.logits(model, ids), expected)


def test_a_plain_network_takes_it(llama):
    from peft import get_peft_model

    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    config = QueryableMemoryConfig(r=2, num_atoms=3, key_dim=4, query_sketch=4, target_modules=["0", "2"], block_size=1)
    model = get_peft_model(stack, config).train()
    model(torch.randn(16, 6)).sum().backward()
    assert llama.memory(model).queryable_input["default"].inverse_std.all()
