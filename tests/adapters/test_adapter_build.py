"""From options to an adapted model: seeds, optimizer groups, facts, targets."""

from __future__ import annotations

import pytest
import torch

from qmemtune.adapters import apply_adapter, auxiliary_loss, describe, parameter_groups
from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.config.adapters import LoraConfig, QueryableConfig

CONFIGS = [
    LoraConfig(r=4),
    QueryableConfig(r=4, block_size=2, core_weight_decay=0.3, instruction_prior=0.5),
    QueryableConfig(r=4, block_size=4, depth_summary=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "queryable", "one-block"])
def test_every_trainable_parameter_is_in_one_group(llama, config):
    model = apply_adapter(llama.base(), config, seed=0)
    groups = parameter_groups(model, config, learning_rate=1e-3, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert groups[0]["lr"] == 1e-3
    assert groups[0]["weight_decay"] == 0.1
    if isinstance(config, QueryableConfig):
        memory = llama.memory(model)
        assert [id(p) for p in groups[2]["params"]] == [id(memory.queryable_core["default"])]
        assert groups[1]["lr"] == groups[2]["lr"] == 1e-3 * config.memory_learning_rate_multiplier
        assert groups[1]["weight_decay"] == 0
        assert groups[2]["weight_decay"] == config.core_weight_decay
    torch.optim.AdamW(groups).step()


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "queryable", "one-block"])
def test_the_seed_alone_decides_the_start(llama, config):
    def weights(seed):
        model = apply_adapter(llama.base(), config, seed=seed)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    first = weights(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = weights(3)
    other = weights(4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(99)
    assert torch.equal(torch.get_rng_state(), state)


def test_building_leaves_the_random_state(llama):
    base = llama.base()
    state = torch.get_rng_state()
    apply_adapter(base, QueryableConfig(r=4), seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_facts(llama):
    model = apply_adapter(llama.base(), QueryableConfig(r=4, num_atoms=6, block_size=2), seed=0)
    facts = describe(model)
    assert facts["kind"] == "queryable"
    assert facts["adapted_layers"] == 28
    assert facts["num_blocks"] == 2
    assert facts["num_atoms"] == 6
    assert facts["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts["memory_parameters"] == sum(p.numel() for p in llama.memory(model).parameters())
    assert describe(apply_adapter(llama.base(), LoraConfig(r=4), seed=0))["kind"] == "lora"
    assert auxiliary_loss(model) is None


@pytest.mark.parametrize("kind", [LoraConfig, QueryableConfig])
def test_all_linear_layers_of_some_decoder_layers(llama, kind):
    """With the default targets, which PEFT does not take beside a choice of layers."""
    base = llama.base()
    expected = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and ".layers.1." in n}
    model = apply_adapter(base, kind(layers_to_transform=[1]), seed=0)
    assert set(model.base_model.targeted_module_names) == expected


@pytest.mark.parametrize("kind", [LoraConfig, QueryableConfig])
def test_layers_to_transform_and_exclusions(llama, kind):
    config = kind(target_modules=["q_proj", "up_proj"], exclude_modules=["up_proj"], layers_to_transform=[1, 3])
    model = apply_adapter(llama.base(), config, seed=0)
    assert sorted(model.base_model.targeted_module_names) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.3.self_attn.q_proj",
    ]


def test_blocks_are_contiguous_decoder_layers(family):
    model = family.adapted(block_size=3)
    blocks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QueryableLinear):
            index = next(int(part) for part in name.split(".") if part.isdigit())
            blocks.setdefault(index, set()).add(layer.block["default"])
    assert blocks == {0: {0}, 1: {0}, 2: {0}, 3: {1}}


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["lora", "queryable"])
def test_training_lowers_the_loss(family, config):
    model = apply_adapter(family.base(), config, seed=0).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config, learning_rate=5e-3, weight_decay=0.0))
    ids, losses = family.tokens(4, 12), []
    for _ in range(12):
        loss = family.loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
