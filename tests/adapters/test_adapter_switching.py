"""Several adapters in one model: disabled, switched, deleted, unloaded; only the active one trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qmemtune.adapters import memory_of
from qmemtune.adapters.queryable.layer import QueryableLinear

SECOND = {"r": 2, "num_atoms": 3, "block_size": 1, "target_modules": "all-linear"}


@pytest.fixture
def two(family):
    """A model with the adapters ``default`` and ``second``, which differ in every size; ``default`` is active."""
    model = family.adapted()
    model.add_adapter("second", family.config(**SECOND))
    for name, parameter in model.named_parameters():
        if "queryable_" in name and ".second" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_disabled_gives_the_base_bit_for_bit(family):
    base, model, ids = family.base(), family.adapted(), family.tokens(3, 9)
    with model.disable_adapter():
        assert torch.equal(family.logits(model, ids), family.logits(base, ids))
    assert not torch.allclose(family.logits(model, ids), family.logits(base, ids), atol=1e-2)
    assert any("queryable_core" in name for name in trainable(model))


def test_a_second_adapter_disturbs_nothing(family):
    model, ids = family.adapted(), family.tokens(3, 9)
    before, names = family.logits(model, ids), trainable(model)
    model.add_adapter("second", family.config(**SECOND))
    assert torch.equal(family.logits(model, ids), before)
    assert trainable(model) == names
    layers = [m for m in model.modules() if isinstance(m, QueryableLinear)]
    assert layers
    assert all(set(layer.queryable_A) == {"default", "second"} for layer in layers)
    assert not any(isinstance(m, QueryableLinear) for layer in layers for m in layer.base_layer.modules())


def test_switching(family, two):
    ids = family.tokens(3, 9)
    first = family.logits(two, ids)
    two.set_adapter("second")
    second = family.logits(two, ids)
    assert not torch.allclose(first, second, atol=1e-2)
    assert {route.shape[-1] for route in family.routes(two, ids).values()} == {3}
    assert len(family.routes(two, ids)) == 4
    two.set_adapter("default")
    assert torch.equal(family.logits(two, ids), first)


@pytest.mark.parametrize("active", ["default", "second"])
def test_only_the_active_adapter_trains(family, two, active):
    two.set_adapter(active)
    names = trainable(two)
    assert any("queryable_core" in name for name in names)
    assert any("queryable_B" in name for name in names)
    assert all(f".{active}" in name for name in names)
    before = {name: p.detach().clone() for name, p in two.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in two.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    two.train()
    family.loss(two, family.tokens(3, 9)).backward()
    optimizer.step()
    changed = {name for name, p in two.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


def test_set_requires_grad(llama):
    model = llama.adapted()
    model.add_adapter("second", llama.config(**SECOND))
    model.set_requires_grad("default", False)
    assert not trainable(model)
    model.set_requires_grad(["default", "second"], True)
    names = trainable(model)
    for adapter in ("default", "second"):
        assert any("queryable_core" in name and name.endswith(adapter) for name in names)


@pytest.mark.parametrize("deleted", ["default", "second"])
def test_deleting(family, two, deleted):
    ids = family.tokens(3, 9)
    kept = "second" if deleted == "default" else "default"
    two.set_adapter(kept)
    expected = family.logits(two, ids)
    two.set_adapter(deleted)
    two.delete_adapter(deleted)
    assert two.active_adapters == [kept]
    assert not [name for name, _ in two.named_parameters() if "queryable_" in name and f".{deleted}" in name]
    assert torch.equal(family.logits(two, ids), expected)
    assert set(family.memory(two).configs) == {kept}
    assert any("queryable_core" in name for name in trainable(two))
    two.add_adapter(deleted, family.config(**SECOND))
    two.set_adapter(deleted)
    family.logits(two, ids)


def test_deleting_the_last_leaves_the_base(llama):
    model, ids = llama.adapted(), llama.tokens(2, 7)
    model.delete_adapter("default")
    assert torch.equal(llama.logits(model.base_model.model, ids), llama.logits(llama.base(), ids))
    assert not list(llama.memory(model).parameters())


def test_the_memory_has_no_weight_of_its_own(llama):
    """Code that looks through all modules for a weight must not find PEFT's endless search for a base layer."""
    memory = llama.memory(llama.adapted())
    assert not hasattr(memory, "weight")
    assert not hasattr(memory, "bias")


def test_unload_gives_back_the_base(family):
    base, model, ids = family.base(), family.adapted(), family.tokens(3, 9)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    family.loss(model.train(), ids).backward()
    plain = model.unload().eval()
    assert memory_of(plain) is None
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert not any(
        m._forward_pre_hooks or m._forward_hooks for m in plain.modules() if m is not plain.get_input_embeddings()
    )
    assert torch.equal(family.logits(plain, ids), family.logits(base, ids))
    plain.train().requires_grad_(True)
    plain(input_ids=ids, labels=ids).loss.backward()
    again = family.adapted(base=plain)
    assert torch.equal(family.logits(again, ids), family.logits(family.adapted(), ids))


def test_merging_is_refused(llama):
    model = llama.adapted()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="merge-export"):
            merge()


def test_mixed_batches_are_refused(llama):
    model = llama.adapted()
    with pytest.raises(ValueError, match="adapter"):
        model(input_ids=llama.tokens(2, 4), adapter_names=["default", "__base__"])


def test_cast_adapters_still_train_and_route_in_float32(llama):
    """TRL casts a quantised model's adapters to bfloat16; routing stays in float32."""
    model, ids = llama.adapted().train(), llama.tokens(3, 9)
    for name, parameter in model.named_parameters():
        if "queryable_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert all(route.dtype == torch.float32 for route in llama.routes(model, ids).values())
    llama.loss(model, ids).backward()
    assert all(gradient.isfinite().all() for gradient in llama.gradients(model).values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_autocast_step_works(family, checkpointing):
    model, ids = family.adapted(instruction_prior=0.5).train(), family.tokens(3, 9)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(route.dtype == torch.float32 for route in family.routes(model, ids).values())
        loss = family.loss(model, ids)
    loss.backward()
    gradients = family.gradients(model)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())


def test_a_bfloat16_base_keeps_its_output_type(llama):
    base = llama.base().to(torch.bfloat16)
    model, ids = llama.adapted(base=base), llama.tokens(2, 7)
    assert llama.logits(model, ids).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "queryable_" in name)
