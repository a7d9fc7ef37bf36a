"""Packed rows train like rows alone: logits, routes, loss and gradients; models that cannot keep them apart."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from qmemtune.adapters import apply_adapter
from qmemtune.adapters.queryable import memory_of
from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.compose import compose
from qmemtune.data.collate import Collator
from qmemtune.data.packing import PackCollator
from qmemtune.engine.batching import check_rows_stay_apart
from qmemtune.engine.loss import LabelledLoss
from qmemtune.engine.plan import plan
from qmemtune.engine.run import train
from qmemtune.errors import UserError

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
    inputs = dict(batch)
    texts, rows = inputs.pop("instruction"), inputs.pop("instruction_row", None)
    inputs.pop("origin", None)
    if "position_ids" in inputs:
        inputs.pop("attention_mask")
    model.zero_grad()
    memory, labelled = memory_of(model), LabelledLoss(model)
    with memory.instructed(embedded(texts), rows) if memory else nullcontext(), labelled.installed():
        loss, _ = model(**inputs)
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
    check_rows_stay_apart(model, torch.device("cpu"), torch.float32)
    check_rows_stay_apart(model, torch.device("cpu"), torch.bfloat16)
    assert [module.training for module in model.modules()] == training


def test_a_model_that_lets_rows_see_each_other_is_refused(monkeypatch):
    model = adapted("lora")
    base = model.get_base_model()
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        check_rows_stay_apart(model, torch.device("cpu"), torch.float32)


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


def test_routes_of_whole_rows_cannot_be_packed():
    with pytest.raises(UserError, match="whole row"):
        compose(["recipe=quickstart", "trainer.packing=true", "adapter.granularity=row"])
