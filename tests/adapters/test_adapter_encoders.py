"""Sentence encoders: known by content, computed once a text, one for each adapter; the prior's schedule."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from qmemtune.adapters import InstructionSource, apply_adapter, auxiliary_loss, instructions
from qmemtune.adapters.queryable import sentence
from qmemtune.config.adapters import QueryableConfig
from qmemtune.errors import UserError

TEXTS = ["Reverse the words", "Sort these numbers", ""]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def folder(make_encoder, tokenizer, tmp_path):
    return make_encoder(tmp_path / "tiny-encoder", tokenizer)


@pytest.fixture
def adapted(llama, folder):
    def make(**options):
        return llama.adapted(**{"instruction_prior": 1.5, "prior_encoder": str(folder), "prior_dim": 16, **options})

    return make


@pytest.fixture
def encoded(monkeypatch, tmp_path):
    """The texts that a model really encoded, with a cache of this test's own."""
    monkeypatch.setenv("QMEMTUNE_CACHE", str(tmp_path / "cache"))
    texts: list[str] = []
    real = sentence.SentenceEncoder._encode

    def encode(self, text):
        texts.append(text)
        return real(self, text)

    monkeypatch.setattr(sentence.SentenceEncoder, "_encode", encode)
    return texts


def test_each_text_is_encoded_once_for_all_runs(adapted, tokenizer, encoded, tmp_path):
    first = InstructionSource(adapted(), tokenizer)
    embedded = first.embed([*TEXTS, TEXTS[0]])
    torch.testing.assert_close(embedded.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert torch.equal(embedded[0], embedded[3])
    assert sorted(encoded) == sorted(TEXTS[:2])
    second = InstructionSource(adapted(), tokenizer)
    assert torch.equal(second.embed(TEXTS), embedded[:3])
    assert len(encoded) == 2  # from the disk
    (file,) = (tmp_path / "cache" / "instructions").glob("*.sqlite")
    file.write_bytes(b"damaged")
    torch.testing.assert_close(InstructionSource(adapted(), tokenizer).embed(TEXTS), embedded[:3])


def test_another_encoders_embeddings_are_not_taken(make_encoder, adapted, tokenizer, encoded, tmp_path):
    first = InstructionSource(adapted(), tokenizer).embed(TEXTS)
    other = make_encoder(tmp_path / "other", tokenizer, seed=1)
    second = InstructionSource(adapted(prior_encoder=str(other)), tokenizer).embed(TEXTS)
    assert len(encoded) == 4
    assert (first[:2] - second[:2]).abs().max() > 1e-3


def test_first_token_pooling_is_another_embedding_and_others_are_refused(make_encoder, tokenizer, tmp_path):
    mean = make_encoder(tmp_path / "mean", tokenizer)
    cls = make_encoder(tmp_path / "cls", tokenizer, pooling="cls_token")
    assert (sentence.pooling_of(mean), sentence.pooling_of(cls)) == ("mean", "cls")
    assert sentence.folder_digest(mean) != sentence.folder_digest(cls)
    strange = make_encoder(tmp_path / "max", tokenizer, pooling="max_tokens")
    with pytest.raises(UserError, match="neither mean nor first token"):
        sentence.embedding_dim(strange)
    with pytest.raises(UserError, match="there is no such folder"):
        sentence.embedding_dim(tmp_path / "nowhere")


def test_a_saved_adapter_knows_its_encoder_by_content_not_by_place(
    make_encoder, adapted, llama, tokenizer, folder, encoded, tmp_path
):
    model = adapted()
    source = InstructionSource(model, tokenizer)
    ids = llama.tokens(3, 7)
    with source.context(TEXTS):
        expected = llama.logits(model, ids)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "adapter_config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert json.loads(text)["prior_encoder"] == "tiny-encoder"
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    loaded = PeftModel.from_pretrained(llama.base(), str(tmp_path / "saved"))
    with pytest.raises(UserError, match="tiny-encoder, is not found"):
        InstructionSource(loaded, tokenizer)
    with pytest.raises(UserError, match="not the one that the adapter was trained with"):
        InstructionSource(loaded, tokenizer, places=[make_encoder(tmp_path / "other", tokenizer, seed=1)])
    with InstructionSource(loaded, tokenizer, places=[moved]).context(TEXTS):
        assert torch.equal(llama.logits(loaded, ids), expected)
    shutil.move(moved, tmp_path / "saved" / "tiny-encoder")
    assert InstructionSource(loaded, tokenizer, places=[tmp_path / "saved"]).active


def test_adapters_of_one_model_have_their_own_encoders(make_encoder, adapted, llama, tokenizer, encoded, tmp_path):
    wide = make_encoder(tmp_path / "wide", tokenizer, seed=2, width=24)
    ids = llama.tokens(3, 7)
    alone = {}
    for name, options in {"a": {}, "b": {"prior_encoder": str(wide), "prior_dim": 24}}.items():
        model = adapted(**options)
        with InstructionSource(model, tokenizer).context(TEXTS):
            alone[name] = llama.logits(model, ids)
    both = adapted()
    source = InstructionSource(both, tokenizer)
    both.add_adapter("b", llama.config(instruction_prior=1.5, prior_encoder=str(wide), prior_dim=24))
    both.add_adapter("plain", llama.config())
    memory, b = llama.memory(both), adapted(prior_encoder=str(wide), prior_dim=24)
    weights = {n.replace(".default", ".b"): p for n, p in b.named_parameters() if "queryable_" in n}
    means = {n.replace(".default", ".b"): m for n, m in b.named_buffers() if "queryable_" in n}
    with torch.no_grad():
        for parameter, value in weights.items():
            both.get_parameter(parameter).copy_(value)
        for buffer, value in means.items():
            both.get_buffer(buffer).copy_(value)
    with source.context(TEXTS):
        assert torch.equal(llama.logits(both, ids), alone["a"])
        both.set_adapter("b")
        assert torch.equal(llama.logits(both, ids), alone["b"])
    both.delete_adapter("b")
    assert set(memory.configs) == {"default", "plain"}
    with source.context(TEXTS):
        both.set_adapter("plain")
        assert torch.equal(llama.logits(both, ids), _without(both, llama, ids))


def _without(model, llama, ids):
    with llama.memory(model).instructed({}):
        return llama.logits(model, ids)


def test_the_schedule_moves_all_three_values(llama, tokenizer):
    """Half way, the adapter is the one whose options are the means of both ends."""
    ids = llama.tokens(2, 6)
    given = torch.nn.functional.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), dim=-1)

    def losses(**options):
        model = llama.adapted(**options)
        memory = llama.memory(model)
        with memory.instructed(given):
            logits = llama.logits(model, ids)
            return logits, auxiliary_loss(model)

    ends = {"instruction_prior": (2.0, 1.0), "prior_temperature": (0.5, 1.5), "prior_kl": (0.4, 0.0)}
    start = {name: pair[0] for name, pair in ends.items()}
    final = {f"{name}_final": pair[1] for name, pair in ends.items()}
    half = losses(**start, **final, prior_progress=0.5)
    expected = losses(**{name: sum(pair) / 2 for name, pair in ends.items()})
    assert torch.equal(half[0], expected[0])
    assert torch.equal(half[1], expected[1])
    assert torch.equal(losses(**start, **final)[0], losses(**start)[0])


def test_a_prior_that_has_faded_out_leaves_the_routes_alone(llama):
    faded, plain = (
        llama.adapted(instruction_prior=1.0, instruction_prior_final=0.0, prior_progress=progress, top_k=4)
        for progress in (1.0, 0.0)
    )
    ids, given = llama.tokens(2, 6), torch.ones(2, 32)
    with llama.memory(faded).instructed(given):
        assert torch.equal(llama.logits(faded, ids), llama.logits(plain, ids))


def test_the_last_embeddings_are_kept_on_the_cpu_and_no_more_than_a_few(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(instructions, "KEPT_EMBEDDINGS", 3)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**{**llama.base().config.to_dict(), "vocab_size": 1000}))
    source = InstructionSource(llama.adapted(base=base, instruction_prior=1.5), tokenizer)
    (_, encoder) = source._encoders["default"]
    asked: list[str] = []
    real = encoder.encode

    def encode(texts):
        asked.extend(texts)
        return real(texts)

    monkeypatch.setattr(encoder, "encode", encode)
    many = ["one", "two", "three", "four", "five", "one", ""]
    embedded = source.embed(many)
    assert torch.equal(embedded[:5], real(many[:5]))
    assert torch.equal(embedded[5], embedded[0])
    assert not embedded[6].any()
    assert len(source._known) == 3
    asked.clear()
    source.embed(["a"])
    source.embed(["b"])
    source.embed(["a"])
    source.embed(["c", "d"])
    source.embed(["a"])
    assert asked == ["a", "b", "c", "d"]
    # A tensor of its own, on the CPU: not a row of what the encoder made for a batch, wherever that is.
    assert all(row.device.type == "cpu" and row._base is None for row in source._known.values())
    monkeypatch.setattr(encoder, "device", torch.device("meta"))
    assert source.embed(["a", "c"]).device.type == "meta"
    assert all(row.device.type == "cpu" for row in source._known.values())


def test_a_folder_called_base_is_not_the_base_models_embeddings(make_encoder, llama, tokenizer, encoded, tmp_path):
    folder = make_encoder(tmp_path / "minilm" / "base", tokenizer)
    config = QueryableConfig(r=4, instruction_prior=1.5, prior_encoder=str(folder))
    model = apply_adapter(llama.base(), config, seed=0)
    expected = InstructionSource(model, tokenizer).embed(TEXTS)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["prior_encoder"] == "base"
    loaded = PeftModel.from_pretrained(llama.base(), str(tmp_path / "saved"))
    assert torch.equal(InstructionSource(loaded, tokenizer, places=[folder]).embed(TEXTS), expected)
    with pytest.raises(UserError, match="instruction encoder, base, is not found"):
        InstructionSource(loaded, tokenizer)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text(encoding="utf-8"))
    assert again["prior_encoder_digest"] == saved["prior_encoder_digest"]


def test_a_folder_given_without_its_name_is_saved_with_it(
    make_encoder, llama, tokenizer, encoded, tmp_path, monkeypatch
):
    folder = make_encoder(tmp_path / "tiny-encoder", tokenizer)
    monkeypatch.chdir(folder)
    model = apply_adapter(llama.base(), QueryableConfig(r=4, instruction_prior=1.5, prior_encoder="."), seed=0)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["prior_encoder"] == "tiny-encoder"
    loaded = PeftModel.from_pretrained(llama.base(), str(tmp_path / "saved"))
    assert InstructionSource(loaded, tokenizer, places=[tmp_path]).active
