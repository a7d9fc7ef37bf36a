"""Rows in one sequence, packed or one behind the other, train like rows alone: logits, routes, loss and gradients;
models that cannot keep them apart; runs that began with padded rows."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)
from transformers.masking_utils import create_causal_mask

from qmemtune.adapters import apply_adapter
from qmemtune.adapters.queryable import memory_of
from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.compose import compose
from qmemtune.data.collate import Collator, model_inputs
from qmemtune.data.packing import PackCollator, without_padding
from qmemtune.engine import batching, made_with
from qmemtune.engine.batching import BatchForm, check_rows_stay_apart
from qmemtune.engine.loss import LabelledLoss
from qmemtune.engine.manifest import MANIFEST, digest, sha256
from qmemtune.engine.plan import plan
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.models import attention
from qmemtune.models.attention import rows_of, training_attention

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MEMORY = {"r": 4, "num_atoms": 4, "key_dim": 4, "block_size": 1}
REENTRANT = ("trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing_use_reentrant=true")
ADAPTERS = {
    "lora": LoraConfig(r=4),
    "queryable": QueryableConfig(**MEMORY),
    "prior": QueryableConfig(**MEMORY, instruction_prior=1.0),
}


def adapted(kind: str, config=None, kernel: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL), attn_implementation=kernel).float()
    model = apply_adapter(base.requires_grad_(False), copy.deepcopy(ADAPTERS[kind]), seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def some_rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate((5, 9, 3, 12, 7)):
        ids = torch.randint(1, 96, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "position_ids": list(range(length))}
        # One row without an instruction, two with the same one.
        rows.append(row | {"instruction": ["", "a", "b", "a", "c"][number]})
    return rows


def in_two_packs(rows) -> list[dict]:
    packs = [{key: [x for i in pack for x in rows[i][key]] for key in rows[0]} for pack in ((0, 1, 2), (3, 4))]
    for pack, numbers in zip(packs, ((0, 1, 2), (3, 4)), strict=True):
        pack["instruction"] = [rows[i]["instruction"] for i in numbers]
    return packs


def embedded(texts) -> torch.Tensor:
    known = dict(zip("abc", F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(1))), strict=True))
    return torch.stack([known.get(text, torch.zeros(32)) for text in texts])


def loss_and_gradients(model, batch):
    model.zero_grad()
    memory, labelled = memory_of(model), LabelledLoss(model)
    prior = memory.instructed(embedded(batch["instruction"]), batch.get("instruction_row")) if memory else nullcontext()
    with prior, rows_of(batch.get("row_lengths")), labelled.installed():
        loss, _ = model(**model_inputs(batch))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_loss_and_gradients_of_packed_rows_are_those_of_rows_alone(kind, kernel):
    model, rows = adapted(kind, kernel=kernel), some_rows()
    loss, gradients = loss_and_gradients(model, Collator(0)(rows))
    packed_loss, packed_gradients = loss_and_gradients(model, PackCollator(0)(in_two_packs(rows)))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def alone(monkeypatch) -> set:
    """Tokens of each row for which torch's attention was called; those with a mask below zero."""
    seen, real = set(), F.scaled_dot_product_attention

    def watched(query, *args, attn_mask=None, **kwargs):
        seen.add(query.shape[2] if attn_mask is None else -query.shape[2])
        return real(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize(("short", "expected"), [(0, {3, 5, 7, 9, 12}), (8, {9, 12}), (64, {12})])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_loss_and_gradients_of_rows_without_padding_are_those_of_rows_alone(
    kind, checkpointing, short, expected, alone, monkeypatch
):
    monkeypatch.setattr(attention, "SHORT", short)
    # In float32 the routes of such weights make 5e-5 of the order of a sum, on some machines.
    model, rows = adapted(kind).double(), some_rows()
    loss, gradients = loss_and_gradients(model, Collator(0)(rows))
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    without_positions = [{name: row[name] for name in ("input_ids", "labels", "instruction")} for row in rows]
    for given in (without_positions, in_two_packs(rows)):
        batch = without_padding(given)
        assert batch["row_lengths"] == [3, 5, 7, 9, 12]
        assert batch["input_ids"].shape == (1, 36)
        alone.clear()
        with training_attention():
            joined_loss, joined_gradients = loss_and_gradients(model, batch)
        # Short neighbours of like length have one call for all of them. Four are LabelledLoss's, which tries the model.
        assert alone - {4} == expected
        torch.testing.assert_close(joined_loss, loss, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == joined_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(joined_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


WINDOW = {"sliding_window": 4}
CONFIGS = [
    MistralConfig(**SMALL, **WINDOW),
    Qwen2Config(
        **SMALL, **WINDOW, use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    Gemma3TextConfig(**SMALL, **WINDOW, head_dim=8),
    GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    ),
    LlamaConfig(**SMALL),
]  # fmt: skip


def logits_and_gradients(model, *passes) -> list[torch.Tensor]:
    """Logits of the last pass's tokens and what a loss over all passes gives, (N, V) first."""
    model.zero_grad()
    logits = torch.cat([model(**inputs, use_cache=False).logits[0] for inputs in passes])
    logits.double().log_softmax(-1)[:, 5].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("short", [0, 64])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_rows_without_padding_keep_their_windows_and_positions(config, short, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", short)
    model, rows = adapted("lora", config).double(), some_rows()
    batch = without_padding([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    rows.sort(key=lambda row: len(row["input_ids"]))
    alone = logits_and_gradients(model, *({"input_ids": torch.tensor([row["input_ids"]])} for row in rows))
    with training_attention(), rows_of(batch["row_lengths"]):
        joined = logits_and_gradients(model, {name: batch[name] for name in ("input_ids", "position_ids")})
    assert len(joined) > 1
    for found, right in zip(joined, alone, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), MistralConfig(**SMALL, **WINDOW)])
def test_rows_without_padding_in_bfloat16(config, autocast):
    exact, rows = adapted("lora", config), sorted(some_rows(), key=lambda row: len(row["input_ids"]))
    model = copy.deepcopy(exact) if autocast else copy.deepcopy(exact).to(torch.bfloat16)
    passes = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]
    batch = without_padding([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    right = logits_and_gradients(exact, *passes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = logits_and_gradients(model, *passes)
        with training_attention(), rows_of(batch["row_lengths"]):
            joined = logits_and_gradients(model, {name: batch[name] for name in ("input_ids", "position_ids")})
    distance, usual = (
        torch.cat([(x - y).flatten().double() for x, y in zip(found, right, strict=True)]).norm()
        for found in (joined, alone)
    )
    assert 0 < distance < 1.5 * usual


def test_what_short_attention_cannot_compute_falls_to_the_kernel_row_by_row(alone):
    model, rows = adapted("lora", LlamaConfig(**SMALL, attention_dropout=0.5)), some_rows()
    batch = without_padding([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    with training_attention(), rows_of(batch["row_lengths"]):
        alone.clear()
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert alone == {3, 5, 7, 9, 12}


def test_a_row_alone_is_not_split_again():
    """The backward pass of a split copies: once for queries, keys and values of a layer, and not for each row too."""
    model, lengths = adapted("lora"), [70, 80, 90]
    ids = torch.randint(1, 96, (1, sum(lengths)))
    positions = torch.cat([torch.arange(tokens) for tokens in lengths]).unsqueeze(0)
    with training_attention(), rows_of(lengths):
        loss = model(input_ids=ids, position_ids=positions, use_cache=False).logits.sum()
    nodes, names = [loss.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names[node] = node.name()
            nodes += [after for after, _ in node.next_functions]
    splits = sum("Split" in name for name in names.values())
    assert splits == 3 * SMALL["num_hidden_layers"]


def test_a_mask_that_lost_its_rows_is_no_mask_for_all_tokens():
    config = GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    model = adapted("lora", config)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = without_padding([{name: row[name] for name in ("input_ids", "labels")} for row in some_rows()])
    with training_attention(), rows_of(batch["row_lengths"]):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        # Reentrant checkpointing hands detached arguments to the layers that it runs again.
        with pytest.raises(RuntimeError, match="rows of one sequence would see each other"):
            logits.sum().backward()


def test_nothing_is_kept_apart_after_the_pass():
    model, rows = adapted("lora"), some_rows()
    ids = torch.tensor([rows[3]["input_ids"]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with training_attention():
            with pytest.raises(ZeroDivisionError), rows_of([5, 7]):
                raise ZeroDivisionError
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_routes_of_packed_rows_are_those_of_rows_alone():
    model, rows = adapted("queryable").eval(), some_rows()
    memory = memory_of(model)
    seen: list[torch.Tensor] = []
    memory.observer = lambda adapter, block, route, mask: seen.append(route)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
        blocks = len(seen) // len(rows)
        alone = [torch.cat([route[0] for route in seen[block::blocks]]) for block in range(blocks)]
        seen.clear()
        batch = PackCollator(0)(in_two_packs(rows))
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    real = batch["attention_mask"].bool()
    assert blocks == 3
    for block, route in enumerate(seen):
        torch.testing.assert_close(route[real], alone[block], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen2Config(**SMALL), MistralConfig(**SMALL)])
def test_the_check_passes_where_rows_stay_apart(config):
    model = adapted("lora", config)
    training = [module.training for module in model.modules()]
    check_rows_stay_apart(model, "trainer.packing", torch.device("cpu"), torch.float32)
    check_rows_stay_apart(model, "trainer.packing", torch.device("cpu"), torch.bfloat16)
    assert [module.training for module in model.modules()] == training


def test_a_model_that_lets_rows_see_each_other_is_refused(monkeypatch):
    model = adapted("lora", kernel="eager")
    base = model.get_base_model()
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(UserError, match="does not keep rows of one sequence apart"):
        check_rows_stay_apart(model, "trainer.packing", torch.device("cpu"), torch.float32)


def test_positions_alone_do_not_keep_rows_apart_in_every_model(monkeypatch):
    """Some models make their mask without the positions, as OPT does: only the rows' lengths tell the rows apart."""

    def without_positions(*args, position_ids=None, **kwargs):
        return create_causal_mask(*args, **kwargs)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", without_positions)
    model = adapted("lora")
    check_rows_stay_apart(model, "trainer.packing", torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="does not keep rows of one sequence apart"):
        check_rows_stay_apart(model, "trainer.packing", torch.device("cpu"), torch.float32, padding_free=False)


def test_packs_are_tried_in_a_batch_of_several(monkeypatch):
    """FlashAttention looks at the positions of a batch of one sequence only."""

    def of_one_sequence(*args, position_ids=None, **kwargs):
        alone = kwargs["inputs_embeds"].shape[0] == 1
        return create_causal_mask(*args, position_ids=position_ids if alone else None, **kwargs)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", of_one_sequence)
    with pytest.raises(UserError, match="does not keep rows of one sequence apart"):
        check_rows_stay_apart(
            adapted("lora"), "trainer.packing", torch.device("cpu"), torch.float32, padding_free=False
        )


def test_memory_that_runs_out_in_the_check_says_nothing_about_the_model(monkeypatch):
    model = adapted("lora")

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(model.get_base_model(), "forward", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        check_rows_stay_apart(model, "trainer.padding_free", torch.device("cpu"), torch.float32)


def test_a_model_that_takes_no_such_sequence_is_refused(monkeypatch):
    model = adapted("lora")
    base = model.get_base_model()
    forward = base.forward

    def without_positions(*args, position_ids=None, **kwargs):
        if position_ids is not None:
            raise NotImplementedError("no positions\nhere")
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", without_positions)
    with pytest.raises(UserError) as error:
        check_rows_stay_apart(model, "trainer.padding_free", torch.device("cpu"), torch.float32)
    problem = "this model takes no rows in one sequence: NotImplementedError: no positions"
    assert error.value.findings[0].problem == problem


@pytest.mark.parametrize(
    ("adapter", "more"),
    [("lora", []), ("queryable", []), ("queryable", ["adapter.instruction_prior=1", "adapter.prior_kl=0.1"])],
)
def test_a_run_with_packed_rows(composed, recorder, adapter, more):
    progress = recorder()
    overrides = ("trainer.packing=true", "data.max_length=200", "trainer.per_device_train_batch_size=1")
    config = composed(*overrides, *more, adapter=adapter)
    planned = plan(config)
    summary = train(config, progress=progress)
    assert summary["steps"] == 4
    assert summary["train_loss"] > 0
    (line,) = [text for text in progress.messages if text.startswith("batches:")]
    assert f"packed into {planned['rows']:,} sequences of up to 200 tokens" in line


def test_routes_of_whole_rows_cannot_be_in_one_sequence():
    for option in ("packing", "padding_free"):
        with pytest.raises(UserError, match="whole row"):
            compose(["recipe=quickstart", f"trainer.{option}=true", "adapter.granularity=row"])


@pytest.mark.parametrize(
    ("kernel", "device", "overrides", "free"),
    [
        ("sdpa", "cpu", (), True),
        ("eager", "cpu", (), False),
        ("sdpa", "cuda", (), False),
        ("sdpa", "cuda", ("trainer.padding_free=true",), True),
        ("sdpa", "cpu", ("trainer.compile=true",), False),
        ("sdpa", "cpu", ("model.attn_implementation=sdpa",), False),
        ("sdpa", "cpu", ("trainer.gradient_checkpointing=true",), True),
        ("sdpa", "cpu", (*REENTRANT,), False),
        ("eager", "cuda", ("model.attn_implementation=flash_attention_2",), False),
        ("eager", "cuda", ("model.attn_implementation=flash_attention_2", "trainer.packing=true"), True),
    ],
)
def test_rows_are_padded_where_nothing_else_is_known_to_be_faster(composed, kernel, device, overrides, free):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation=kernel)
    form = BatchForm.of(composed(*overrides).config, torch.device(device), base=base)
    assert (form.padding_free, form.length_grouping) == (free, not free)


def test_reentrant_checkpointing_and_rows_in_one_sequence_are_refused_together():
    with pytest.raises(UserError, match="loses which row of a sequence a token is of"):
        compose(["recipe=quickstart", "adapter=lora", "trainer.padding_free=true", *REENTRANT])


def test_a_model_with_an_attention_of_its_own_has_padded_rows(composed):
    config = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert not BatchForm.of(composed().config, torch.device("cpu"), base=base).padding_free


def test_routes_of_whole_rows_have_padded_rows(composed):
    config = composed("adapter.granularity=row", "evaluation.exact_match.enabled=false", adapter="queryable").config
    assert not BatchForm.of(config, torch.device("cpu")).padding_free


def batches_line(progress) -> str:
    (line,) = [text for text in progress.messages if text.startswith("batches:")]
    return line


def test_a_run_on_a_cpu_has_no_padding_and_rows_at_random(composed, recorder):
    progress = recorder()
    free = train(composed("adapter.dropout=0"), progress=progress)
    assert batches_line(progress) == "batches: rows at random, one behind the other; no padding"
    padded_at_random = ("trainer.padding_free=false", "trainer.length_grouping=false")
    padded = train(composed("adapter.dropout=0", *padded_at_random, run="padded"))
    assert free["tokens"] == padded["tokens"]
    # Adam makes much of gradients near zero, in which rounding differs.
    assert free["eval"]["loss"] == pytest.approx(padded["eval"]["loss"], abs=5e-3)


def test_a_model_that_mixes_rows_gets_padded_ones_unless_told_otherwise(composed, recorder, monkeypatch):
    def mixed(*args, **kwargs):
        raise UserError("its attention is another", where="trainer.padding_free")

    monkeypatch.setattr(batching, "check_rows_stay_apart", mixed)
    progress = recorder()
    train(composed(), progress=progress)
    assert batches_line(progress).startswith("batches: rows of like length together; ")
    assert "rows are padded: its attention is another" in progress.messages
    for option in ("padding_free", "packing"):
        with pytest.raises(UserError, match="its attention is another"):
            train(composed(f"trainer.{option}=true", "data.max_length=200", run=option))


def test_a_run_that_began_with_padded_rows_goes_on_with_them(composed, recorder, adapter_bytes):
    whole = train(composed(*PADDED, *LONG, run="whole"))
    path = whole_run_before(composed, "half")
    facts = json.loads((path / made_with.FILE).read_text())
    # As it was before there was a choice: on, and nothing about padding.
    facts["config"] |= {"trainer.length_grouping": True}
    del facts["config"]["trainer.padding_free"], facts["batches"]
    rewritten(path, made_with.FILE, json.dumps(facts))
    progress = recorder()
    resumed = train(composed(*LONG, "resume=auto", run="half"), progress=progress)
    assert "like length" in batches_line(progress)
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))


def test_a_run_that_began_without_padding_goes_on_without(composed, recorder, adapter_bytes):
    """Also where a new run would pad: with an attention that compares all tokens of a sequence."""
    eager = ("model.attn_implementation=eager", *LONG)
    whole = train(composed("trainer.padding_free=true", *eager, run="whole"))
    run = Path(train(composed("trainer.padding_free=true", *eager, run="half"))["run_dir"])
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    progress = recorder()
    resumed = train(composed(*eager, "resume=auto", run="half"), progress=progress)
    assert "one behind the other" in batches_line(progress)
    assert adapter_bytes(Path(resumed["adapter"])) == adapter_bytes(Path(whole["adapter"]))
    new = recorder()
    train(composed(*eager, run="new"), progress=new)
    assert "one behind the other" not in batches_line(new)


LONG = ("trainer.max_steps=4", "trainer.save_steps=2", "evaluation.at_end=false")
PADDED = ("trainer.padding_free=false", "trainer.length_grouping=true")


def whole_run_before(composed, name: str) -> Path:
    """The checkpoint in the middle of a run with padded rows, the last one there is."""
    run = Path(train(composed(*PADDED, *LONG, run=name))["run_dir"])
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    return run / "checkpoints" / "checkpoint-2"


def rewritten(checkpoint: Path, name: str, text: str) -> None:
    """Change one file of a checkpoint, which then says so itself."""
    (checkpoint / name).write_text(text)
    manifest = checkpoint / MANIFEST
    facts = json.loads(manifest.read_text())
    del facts["digest"]
    facts["files"][name] = {"size": len(text), "sha256": sha256(checkpoint / name)}
    manifest.write_text(json.dumps({**facts, "digest": digest(facts)}))
