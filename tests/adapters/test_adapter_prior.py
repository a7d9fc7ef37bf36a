"""The instruction prior: row by row, in generation, and the contexts that bring the instructions."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from qmemtune.adapters import InstructionSource, auxiliary_loss
from qmemtune.errors import UserError

TEXTS = ["Reverse the words", "Sort these numbers", "", "Reverse the words"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


class Small:
    """A tokenizer whose ids fit the tiny vocabulary."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text, **options):
        return {"input_ids": [i % 64 for i in self.tokenizer(text, **options)["input_ids"]]}


@pytest.fixture
def source_of(tokenizer):
    return lambda model: InstructionSource(model, Small(tokenizer))


def test_embeddings_are_unit_norm_and_remembered(llama, source_of):
    source = source_of(llama.adapted(instruction_prior=1.0))
    embedded = source.embed(TEXTS)
    assert embedded.shape == (4, 32)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(embedded[0], embedded[3])
    assert torch.equal(source.embed(TEXTS[:1])[0], embedded[0])


def test_rows_without_an_instruction_are_untouched_bit_for_bit(family, source_of):
    model, ids = family.adapted(instruction_prior=1.5, top_k=4), family.tokens(4, 9)
    without = family.logits(model, ids)
    with source_of(model).context(TEXTS):
        given = family.logits(model, ids)
    assert torch.equal(given[2], without[2])
    for row in (0, 1, 3):
        assert (given[row] - without[row]).abs().max() > 1e-3
    plain = family.adapted(instruction_prior=0.0, top_k=4)
    state = {n: p for n, p in model.named_parameters() if "prior" not in n}
    plain.load_state_dict(state, strict=False)
    assert torch.equal(family.logits(plain, ids), without)


def test_a_row_alone_has_its_instruction(family, source_of):
    model, ids = family.adapted(instruction_prior=1.5), family.tokens(4, 9)
    source = source_of(model)
    with source.context(TEXTS):
        batch = family.logits(model, ids)
    for row, text in enumerate(TEXTS):
        with source.context([text]):
            torch.testing.assert_close(family.logits(model, ids[row : row + 1])[0], batch[row], rtol=1e-5, atol=1e-5)


def test_the_prior_follows_its_formula(llama, source_of):
    """Routes are softmax(logits + lambda * log p(m | u)), p = softmax(g_m . G u / tau)."""
    model, ids = llama.adapted(instruction_prior=0.7, prior_temperature=0.5), llama.tokens(4, 9)
    memory, source = llama.memory(model), source_of(model)
    plain = llama.routes(model, ids)[0]
    with source.context(TEXTS):
        given = llama.routes(model, ids)[0]
    u = source.embed(TEXTS)
    projected = u @ memory.queryable_prior_projection["default"].T @ memory.queryable_prior_key["default"].T
    log_prior = F.log_softmax(projected / 0.5, dim=-1)
    log_prior[2] = 0
    expected = (plain.log() + 0.7 * log_prior[:, None]).softmax(dim=-1)
    torch.testing.assert_close(given, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_generate_keeps_each_rows_instruction(llama, source_of, options):
    """Rows that generate expands, beams or several sequences, keep the instruction of the row they come from."""
    model, ids = llama.adapted(instruction_prior=2.0), llama.tokens(2, 5)
    source, copies = source_of(model), options.get("num_return_sequences", 1)
    texts = TEXTS[:2]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "top_k": 3, **options}
    if "do_sample" in options:
        # Every new token must come from the three likeliest under its own row's instruction.
        with source.context(texts):
            done = model.generate(input_ids=ids, **options)
        expanded = [text for text in texts for _ in range(copies)]
        with source.context(expanded):
            logits = llama.logits(model, done)
        logits[..., 2] = float("-inf")
        likeliest = logits[:, 4:-1].topk(3, dim=-1).indices
        assert (likeliest == done[:, 5:, None]).any(dim=-1).all()
        return
    with source.context(texts):
        done = model.generate(input_ids=ids, **options)
    for row, text in enumerate(texts):
        with source.context([text]):
            alone = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(done[row], alone[0])


def test_contexts_nest_and_end(llama, source_of):
    model, ids = llama.adapted(instruction_prior=1.0), llama.tokens(1, 6)
    source = source_of(model)
    without = llama.logits(model, ids)
    with source.context(TEXTS[:1]):
        outer = llama.logits(model, ids)
        with source.context(TEXTS[1:2]):
            assert not torch.equal(llama.logits(model, ids), outer)
        assert torch.equal(llama.logits(model, ids), outer)
        with pytest.raises(ZeroDivisionError), source.context(TEXTS[1:2]):
            raise ZeroDivisionError
        assert torch.equal(llama.logits(model, ids), outer)
    assert torch.equal(llama.logits(model, ids), without)


def test_a_wrong_number_of_instructions_is_an_error(llama, source_of):
    model = llama.adapted(instruction_prior=1.0)
    message = "3 instructions were given for a batch of 4 rows"
    with source_of(model).context(TEXTS[:3]), pytest.raises(RuntimeError, match=message):
        llama.logits(model, llama.tokens(4, 5))


def test_without_a_prior_contexts_do_nothing(llama, source_of):
    model, ids = llama.adapted(), llama.tokens(2, 6)
    source = source_of(model)
    assert not source.active
    with source.context(TEXTS[:2]):
        llama.logits(model, ids)
    assert auxiliary_loss(model) is None


def test_training_without_instructions_warns_once(llama):
    model, ids = llama.adapted(instruction_prior=1.0).train(), llama.tokens(2, 6)
    with pytest.warns(UserWarning, match="no instruction reaches the adapter"):
        llama.loss(model, ids).backward()
    llama.gradients(model)  # and every parameter took part, the prior's too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.loss(model, ids)


def test_divergence_counts_real_tokens_of_rows_with_an_instruction(llama, source_of):
    model, ids = llama.adapted(instruction_prior=1.0, prior_kl=0.5, block_size=4).train(), llama.tokens(4, 9)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    source, memory = source_of(model), llama.memory(model)
    plain = llama.routes(model, ids)[0]
    with source.context(TEXTS):
        llama.loss(model, ids, attention_mask=mask)
    found = auxiliary_loss(model)
    assert found is not None
    projected = (
        source.embed(TEXTS) @ memory.queryable_prior_projection["default"].T @ memory.queryable_prior_key["default"].T
    )
    each = (plain * (plain.log() - F.log_softmax(projected, dim=-1)[:, None])).sum(dim=-1)
    weight = mask * torch.tensor([1, 1, 0, 1])[:, None]
    torch.testing.assert_close(found, 0.5 * (each * weight).sum() / weight.sum(), rtol=1e-5, atol=1e-6)


def test_instructions_encoded_in_inference_mode_can_train(llama, source_of):
    """An evaluation may be the first to meet a text."""
    model, ids = llama.adapted(instruction_prior=1.0).train(), llama.tokens(4, 6)
    source = source_of(model)
    with torch.inference_mode(), source.context(TEXTS):
        model(input_ids=ids)
    with source.context(TEXTS):
        llama.loss(model, ids).backward()
    assert llama.gradients(model)


def test_trained_embeddings_do_not_move_the_instructions(llama, source_of):
    """Instructions are embedded by the frozen base, also where the embeddings are trained and saved whole."""
    expected = source_of(llama.adapted(instruction_prior=1.0)).embed(TEXTS)
    model = llama.adapted(instruction_prior=1.0, modules_to_save=["embed_tokens"])
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.add_(
            torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        )
    torch.testing.assert_close(source_of(model).embed(TEXTS), expected)


def test_another_encoder_width_is_an_error(llama, source_of):
    with pytest.raises(UserError, match="made for 7"):
        source_of(llama.adapted(instruction_prior=1.0, prior_dim=7))
