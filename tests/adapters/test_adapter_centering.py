"""Queries without what a block's inputs have in common: measured in the first training pass, saved with the rest."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from qmemtune.adapters import QueryableMemoryConfig, memory_of
from qmemtune.adapters.queryable.centering import InputMeans, centered

WIDTH = 32


def means() -> InputMeans:
    made = InputMeans()
    made.add_block(0, WIDTH)
    return made


def inputs(rows: int = 40, seed: int = 0) -> torch.Tensor:
    """Tokens that have much in common, (rows, 3, 32)."""
    varied = torch.randn(rows, 3, WIDTH, generator=torch.Generator().manual_seed(seed))
    return varied + 20 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))


def test_the_first_pass_is_measured_and_no_later_one():
    made, x = means(), inputs()
    made.measure(0, x, None)
    torch.testing.assert_close(made.of(0, WIDTH), x.mean(dim=(0, 1)), rtol=1e-4, atol=1e-4)
    before = made.of(0, WIDTH).clone()
    made.measure(0, inputs(seed=1), None)
    assert torch.equal(made.of(0, WIDTH), before)


def test_padding_is_not_measured():
    x, mask = inputs(), torch.ones(40, 3, dtype=torch.long)
    padded = torch.cat([x, torch.full((40, 2, WIDTH), 1e3)], dim=1)
    masked, plain = means(), means()
    masked.measure(0, padded, torch.cat([mask, torch.zeros_like(mask)[:, :2]], dim=1))
    plain.measure(0, x, None)
    torch.testing.assert_close(masked.of(0, WIDTH), plain.of(0, WIDTH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", [float("inf"), float("nan")])
def test_a_pass_with_overflow_measures_nothing(damage):
    made, x = means(), inputs()
    broken = x.clone()
    broken[0, 0, 0] = damage
    made.measure(0, broken, None)
    assert not made.of(0, WIDTH).any()
    made.measure(0, x, None)
    assert made.of(0, WIDTH).any()


def test_half_precision_centres_well_enough():
    """What the tokens have in common is 20 times what they differ in; a tenth of that difference may be left of it."""
    x, exact, rounded = inputs(400), means(), means()
    exact.measure(0, x, None)
    rounded.measure(0, x.bfloat16(), None)
    assert (rounded.of(0, WIDTH) - exact.of(0, WIDTH)).abs().max() < 0.3


def test_a_state_like_the_mean_one_is_not_blown_up():
    mean, generator = inputs().mean(dim=(0, 1)), torch.Generator().manual_seed(3)
    for _ in range(50):
        factor = torch.randn(4, WIDTH, generator=generator)
        rounded = F.linear(mean, factor).bfloat16().float()
        assert centered(rounded, F.linear(mean, factor)).square().mean().sqrt() < 0.3
    other = centered(F.linear(inputs().flatten(0, 1), factor), F.linear(mean, factor))
    assert (other.square().mean(dim=-1).sqrt() - 1).abs().median() < 0.05


def test_only_training_measures(family):
    model, ids = family.adapted(stirred=False), family.tokens(3, 9)
    found = family.memory(model).queryable_input["default"]
    family.logits(model.train(), ids)
    family.loss(model.eval(), ids)
    assert not any(mean.any() for mean in found.buffers())
    family.loss(model.train(), ids)
    assert all(mean.any() for mean in found.buffers())
    before = copy.deepcopy(found.state_dict())
    family.loss(model, family.tokens(3, 9, seed=4))
    assert all(torch.equal(before[name], mean) for name, mean in found.state_dict().items())


def test_it_adds_no_parameter_and_no_gradient(llama):
    with_means, without = llama.adapted(), llama.adapted(center_queries=False)
    assert sum(p.numel() for p in with_means.parameters()) == sum(p.numel() for p in without.parameters())
    llama.loss(with_means.train(), llama.tokens(2, 6)).backward()
    assert not any(buffer.requires_grad for buffer in with_means.buffers())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(family, tmp_path, low_cpu_mem_usage):
    model, ids = family.adapted(), family.tokens(3, 9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(family.logits(loaded, ids), family.logits(model, ids))
    expected = dict(family.memory(model).queryable_input.named_buffers())
    for name, mean in family.memory(loaded).queryable_input.named_buffers():
        assert torch.equal(mean, expected[name])
        assert mean.any()


def test_an_adapter_beside_it_and_deleting(llama):
    model, ids = llama.adapted(), llama.tokens(2, 8)
    expected = llama.logits(model, ids)
    model.add_adapter("second", llama.config())
    assert torch.equal(llama.logits(model, ids), expected)
    model.delete_adapter("second")
    assert set(llama.memory(model).queryable_input) == {"default"}


def test_adapters_saved_before_it_stay_as_they_were():
    old = QueryableMemoryConfig(peft_version="0.21.2", target_modules=["q_proj"])
    assert old.center_queries is False
    assert QueryableMemoryConfig(target_modules=["q_proj"]).center_queries is True


class Reversed(nn.Module):
    """Its second layer by name is the first to run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"down": nn.Linear(10, 6), "up": nn.Linear(6, 10)})])

    def forward(self, x):
        return self.layers[0]["down"](self.layers[0]["up"](x).tanh())


def test_the_first_layer_to_run_may_not_be_the_first_by_name(tmp_path):
    def adapted() -> PeftModel:
        torch.manual_seed(0)
        base = Reversed()
        base.config = SimpleNamespace(model_type="custom")
        return get_peft_model(base, QueryableMemoryConfig(r=2, num_atoms=3, key_dim=4, target_modules=["down", "up"]))

    x = torch.randn(16, 6) + 3
    model = adapted().train()
    model(x).sum().backward()
    mean = dict(memory_of(model).queryable_input.named_buffers())["default.mean_0"]
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-4, atol=1e-4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = adapted()
    again.load_state_dict(state)
    assert torch.equal(again.eval()(x), model.eval()(x))
