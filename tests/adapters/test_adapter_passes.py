"""A context belongs to its forward pass: errors, interrupts, nested entries, other threads and odd callers."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from qmemtune.adapters.queryable.layer import QueryableLinear

TINY_BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["layers", "lm_head"])
def test_a_pass_that_was_cut_off_leaves_nothing(llama, error, place):
    """Ctrl-C included, which skips the hooks that close a pass: same shapes, yet no route of the lost pass."""
    model, first, second = llama.adapted(), llama.tokens(2, 7, seed=1), llama.tokens(2, 7, seed=2)
    expected = llama.logits(model, second)
    inner = model.base_model.model
    victim = inner.model.layers[2] if place == "layers" else inner.lm_head

    def interrupt(*args):
        raise error

    hook = victim.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        llama.logits(model, first)
    hook.remove()
    assert torch.equal(llama.logits(model, second), expected)
    hook = victim.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        llama.logits(model, first)
    hook.remove()
    with torch.no_grad():
        hidden = inner.model(input_ids=second).last_hidden_state
        assert torch.equal(inner.lm_head(hidden), expected)
        hidden = inner.model(input_ids=first).last_hidden_state
    assert not torch.equal(inner.lm_head(hidden), expected)
    assert torch.equal(llama.logits(model, second), expected)


def test_the_decoder_alone_gives_the_models_logits(family):
    model, ids = family.adapted(), family.tokens(2, 7)
    inner = model.base_model.model
    with torch.no_grad():
        hidden = inner.get_decoder()(input_ids=ids).last_hidden_state
        assert torch.equal(inner.lm_head(hidden), family.logits(model, ids))
    assert family.memory(model).holder.current is None


class Twice(nn.Module):
    """Runs a decoder twice in one forward, as contrastive losses do."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def forward(self, first, second):
        return [self.decoder(input_ids=ids).last_hidden_state for ids in (first, second)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_called_twice_runs_two_passes(llama, checkpointing):
    decoder = llama.base().model
    targets = ["q_proj", "v_proj", "up_proj"]
    model = llama.adapted(base=Twice(decoder), task_type=None, target_modules=targets).train()
    first, second = llama.tokens(2, 7, seed=1), llama.tokens(2, 7, seed=2)
    with torch.no_grad():
        alone = decoder(input_ids=second).last_hidden_state
    if checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    found = model(first, second)
    assert torch.equal(found[1], alone)
    found[1].square().mean().backward()
    ours = llama.gradients(model)
    decoder(input_ids=second).last_hidden_state.square().mean().backward()
    for name, value in llama.gradients(model).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_several_threads_may_run_one_model(llama):
    """Two passes interleaved layer by layer, in two threads, with rows of the same shape."""
    model = llama.adapted()
    inputs = [llama.tokens(2, 7, seed=seed) for seed in (1, 2)]
    expected = [llama.logits(model, ids) for ids in inputs]
    barrier = threading.Barrier(2, timeout=20)
    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(lambda *_: (barrier.wait(), None)[1])
    found: list = [None, None]

    def work(index):
        found[index] = llama.logits(model, inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_data_parallel_replicas_are_refused(llama):
    """What torch.nn.DataParallel makes of a model on several GPUs."""
    replica = llama.adapted().base_model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel"):
        replica(input_ids=llama.tokens(1, 4))


def test_a_layer_outside_its_model_is_an_error(llama):
    model = llama.adapted()
    layer = next(m for m in model.modules() if isinstance(m, QueryableLinear))
    with pytest.raises(RuntimeError, match="outside its model's forward pass"):
        layer(torch.zeros(1, 3, layer.in_features))


def test_meta_tensors_pass_through(llama):
    with torch.device("meta"):
        base = llama.base()
    model = llama.adapted(base=base, stirred=False, instruction_prior=0.5)
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 5, 64)


def test_moved_to_another_type_and_back(llama):
    model, ids = llama.adapted(), llama.tokens(2, 7)
    expected = llama.logits(model, ids)
    torch.testing.assert_close(llama.logits(model.double(), ids).float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(llama.logits(model.float(), ids), expected)
    model.add_adapter("second", llama.config())


def test_inference_mode_equals_no_grad(llama):
    model, ids = llama.adapted(), llama.tokens(2, 7)
    with torch.inference_mode():
        found = model(input_ids=ids).logits
    assert torch.equal(found, llama.logits(model, ids))


def test_lm_head_may_be_adapted(llama):
    model, ids = llama.adapted(target_modules=["q_proj", "lm_head"], block_size=1).train(), llama.tokens(2, 7)
    llama.loss(model, ids).backward()
    assert any("lm_head" in name for name in llama.gradients(model))
    full = llama.logits(model.eval(), ids)
    with pytest.raises(RuntimeError, match="sees tokens of shape"):
        llama.logits(model, ids, logits_to_keep=1)
    assert torch.equal(llama.logits(model, ids), full)


def test_an_encoder_runs_and_trains(llama):
    torch.manual_seed(0)
    base, ids = BertForMaskedLM(BertConfig(**TINY_BERT)).eval(), llama.tokens(2, 7)
    expected = llama.logits(base, ids)
    model = llama.adapted(base=base, task_type=None, stirred=False, target_modules=["query", "value", "dense"])
    assert torch.equal(llama.logits(model, ids), expected)
    llama.stir(model)
    alone = llama.logits(model, ids[:1])
    torch.testing.assert_close(alone, llama.logits(model, ids)[:1], rtol=1e-5, atol=1e-5)
    model.train()
    llama.loss(model, ids).backward()
    expected_gradients = llama.gradients(model)
    assert expected_gradients


def test_a_pooler_that_sees_one_token_is_an_error(llama):
    """It sees (B, D) where the layers before it saw (B, T, D): broadcasting would be silently wrong for B == T."""
    base, ids = BertForSequenceClassification(BertConfig(**TINY_BERT)), llama.tokens(3, 3)
    for size in (1, 5):
        model = llama.adapted(base=base, task_type=None, target_modules=["query", "pooler.dense"], block_size=size)
        with pytest.raises(RuntimeError, match="exclude_modules"):
            model(input_ids=ids)
        base = model.unload()


def test_a_positional_mask_is_seen(llama):
    model, ids = llama.adapted(), llama.tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    seen = []
    memory = llama.memory(model)
    memory.observer = lambda name, block, weights, token_mask: seen.append(token_mask)
    with torch.no_grad():
        model.base_model.model(ids, mask)
    assert all(torch.equal(found, mask) for found in seen)
    assert seen
