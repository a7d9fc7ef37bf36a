"""Gradient checkpointing, several forwards and other threads change no gradient."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qmemtune.adapters import auxiliary_loss
from qmemtune.adapters.queryable.layer import QueryableLinear

CHECKPOINTED = {"use_reentrant": False}
VARIANTS = {
    "two-layers-a-block": {},
    "a-layer-a-block": {"block_size": 1},
    "one-block": {"block_size": 4},
    "uneven-blocks": {"block_size": 3, "top_k": 2},
    "prior": {"instruction_prior": 0.7, "prior_kl": 0.3},
    "dropout": {"dropout": 0.3},
    "no-summary": {"depth_summary": False},
    "plain-routes": {"router_norm": False, "center_cores": False, "center_queries": False},
    "own-atoms": {"shared_atoms": False},
}


def embeddings(rows: int, seed: int = 5) -> torch.Tensor:
    """Unit-norm instruction embeddings; the last row has none."""
    given = F.normalize(torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)), dim=-1)
    given[-1] = 0
    return given


def instructed(family, model, rows: int, seed: int = 5):
    memory = family.memory(model)
    if not memory.configs["default"].instruction_prior:
        return nullcontext()
    return memory.instructed(embeddings(rows, seed))


def total_loss(family, model, ids, seed: int = 5):
    """The loss with the prior's divergence; the instructions are gone when the backward pass runs."""
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with instructed(family, model, len(ids), seed):
        loss = family.loss(model, ids, attention_mask=mask)
        extra = auxiliary_loss(model)
    assert (extra is not None) == bool(family.memory(model).configs["default"].prior_kl)
    return loss if extra is None else loss + extra


def step(family, model, ids):
    torch.manual_seed(11)
    total_loss(family, model, ids).backward()
    return family.gradients(model)


def same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if "queryable_query" in name)


@pytest.mark.parametrize("name", ["two-layers-a-block", "uneven-blocks", "prior"])
def test_checkpointing_keeps_the_gradients(family, name):
    variant = VARIANTS[name]
    model, ids = family.adapted(**variant).train(), family.tokens(3, 9)
    expected = step(family, model, ids)
    model.gradient_checkpointing_enable(CHECKPOINTED)
    same(step(family, model, ids), expected)
    same(step(family, model, ids), expected)


def test_a_backward_pass_for_some_gradients_leaves_nothing_to_the_next(llama):
    model, ids = llama.adapted().train(), llama.tokens(3, 9)
    expected = step(llama, model, ids)
    loss = total_loss(llama, model, ids)
    some = [p for name, p in model.named_parameters() if "queryable_B" in name]
    torch.autograd.grad(loss, some, retain_graph=True)
    loss.backward()
    same(llama.gradients(model), expected)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_every_nth_layer_keeps_the_gradients(llama, variant, every):
    """The layer that forms a block's route and those that use it need not both be checkpointed."""
    model, ids = llama.adapted(**variant).train(), llama.tokens(3, 9)
    base = model.base_model.model
    if not hasattr(base, "activation_checkpointing_enable"):
        pytest.skip("this version of transformers checkpoints every layer or none")
    expected = step(llama, model, ids)
    base.activation_checkpointing_enable(CHECKPOINTED, every_n_layers=every)
    same(step(llama, model, ids), expected)
    base.activation_checkpointing_disable()
    same(step(llama, model, ids), expected)


@pytest.mark.parametrize("variant", [{}, VARIANTS["prior"]], ids=["plain", "prior"])
@pytest.mark.parametrize("threaded", [False, True])
def test_two_forwards_before_one_backward(family, variant, threaded):
    model, first, second = family.adapted(**variant).train(), family.tokens(3, 9, seed=1), family.tokens(2, 7, seed=2)
    expected = {}
    for ids, seed in ((first, 5), (second, 6)):
        total_loss(family, model, ids, seed).backward()
        for name, gradient in family.gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient
    model.gradient_checkpointing_enable(CHECKPOINTED)
    losses = [total_loss(family, model, first, 5), total_loss(family, model, second, 6)]
    family.logits(model, family.tokens(1, 4))  # a forward without gradients in between disturbs nothing
    if threaded:
        for loss in losses:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
    else:
        sum(losses).backward()
    same(family.gradients(model), expected)


def test_accumulated_gradients_are_the_sum(llama):
    model, ids = llama.adapted().train(), llama.tokens(4, 9)
    model.gradient_checkpointing_enable(CHECKPOINTED)
    llama.loss(model, ids).backward()
    expected = llama.gradients(model)
    for part in ids.split(2):
        (llama.loss(model, part) / 2).backward()
    same(llama.gradients(model), expected)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {}, {"preserve_rng_state": True}])
def test_reentrant_checkpointing_is_refused(llama, options):
    """Also where it is torch's default because nothing was said."""
    model, ids = llama.adapted().train(), llama.tokens(2, 6)
    model.gradient_checkpointing_enable(options)
    with pytest.raises(ValueError, match="use_reentrant"):
        llama.loss(model, ids)
    model.gradient_checkpointing_enable(CHECKPOINTED)
    llama.loss(model, ids).backward()
    assert llama.gradients(model)


def test_a_users_own_checkpoint_of_a_layer_is_an_error(llama):
    """Its recomputation cannot know its forward pass; the message says what to do instead."""
    model, ids = llama.adapted().train(), llama.tokens(2, 6)
    layer = model.base_model.model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    loss = llama.loss(model, ids)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


def test_a_users_own_checkpoint_of_the_whole_model_is_right(llama):
    model, ids = llama.adapted().train(), llama.tokens(2, 6)
    llama.loss(model, ids).backward()
    expected = llama.gradients(model)
    checkpoint(lambda x: llama.loss(model, x), ids, use_reentrant=False).backward()
    same(llama.gradients(model), expected)


def test_nothing_of_a_pass_outlives_it(llama):
    """Contexts hold activations; they must go with the graph of their pass."""
    import gc

    from qmemtune.adapters.queryable.context import ForwardContext

    model, ids = llama.adapted(instruction_prior=0.5, prior_kl=0.1).train(), llama.tokens(2, 6)
    model.gradient_checkpointing_enable(CHECKPOINTED)
    loss = total_loss(llama, model, ids)
    loss.backward()
    del loss
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is ForwardContext]
    holder = llama.memory(model).holder
    assert holder.current is None
    assert not holder.recomputing


def test_train_evaluate_train_gives_the_gradients_of_train_train(family):
    model, ids = family.adapted().train(), family.tokens(3, 9)
    expected = step(family, model, ids)
    model.eval()
    family.logits(model, family.tokens(5, 4))
    model.generate(input_ids=family.tokens(2, 3), max_new_tokens=3)
    with torch.inference_mode():
        model(input_ids=ids)
    model.train()
    found = step(family, model, ids)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_first_layer_called_forms_the_route(llama):
    """The owner is the layer that ran first in this forward, whatever the order of the modules."""
    model, ids = llama.adapted(block_size=4).train(), llama.tokens(2, 6)
    layers = model.base_model.model.model.layers
    for layer in list(layers):
        layers.append(layer)
    del layers[:4]
    reordered = list(layers)[::-1]
    for index, layer in enumerate(reordered):
        layers[index] = layer
        layer.self_attn.layer_idx = index
    expected = step(llama, model, ids)
    model.gradient_checkpointing_enable(CHECKPOINTED)
    same(step(llama, model, ids), expected)
    assert sum(isinstance(m, QueryableLinear) for m in model.modules()) == 28
