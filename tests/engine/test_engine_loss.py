"""The loss at labelled positions equals the ordinary one, gradients too, on models that post-process their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

from qmemtune.data.targets import count_targets
from qmemtune.engine import loss as loss_module
from qmemtune.engine.loss import LabelledLoss

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=8.0),
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}


def make_model(name: str, targets: str | list[str] = "all-linear") -> torch.nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[name])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 96, (3, 11), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    labels = input_ids.clone()
    labels[:, :4] = -100
    labels[mask == 0] = -100
    labels[2] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def ordinary(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_ordinary_ones(name, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    model, batch = make_model(name), make_batch()
    labelled = LabelledLoss(model)
    assert not labelled.full_logits
    with labelled.installed():
        value, auxiliary = model(**batch)
    expected = ordinary(model, batch)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert auxiliary.item() == 0
    ours, theirs = gradients(model, value * 0.5), gradients(model, expected * 0.5)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5)


def test_a_model_that_scales_its_logits_in_another_way_uses_its_own_logits():
    model, batch = make_model("llama"), make_batch()
    base = model.get_base_model()
    own = type(base).forward

    class Odd(type(base)):
        def forward(self, *args, **kwargs):
            output = own(self, *args, **kwargs)
            output.logits = output.logits.pow(3)
            return output

    base.__class__ = Odd
    labelled = LabelledLoss(model)
    assert labelled.full_logits
    with labelled.installed():
        value, _ = model(**batch)
    expected = ordinary(model, batch)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, value), gradients(model, expected)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5)


def test_an_adapted_output_head_gets_its_gradient():
    model, batch = make_model("llama", ["q_proj", "lm_head"]), make_batch()
    labelled = LabelledLoss(model)
    with labelled.installed():
        value, _ = model(**batch)
    ours, theirs = gradients(model, value), gradients(model, ordinary(model, batch))
    assert any("lm_head" in key for key in theirs)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_reaches_every_parameter_with_zero():
    model, batch = make_model("llama"), make_batch()
    batch["labels"][:] = -100
    labelled = LabelledLoss(model)
    with labelled.installed():
        value, _ = model(**batch)
    assert count_targets(batch["labels"]) == 0
    assert value.item() == 0
    found = gradients(model, value)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    assert not any(gradient.any() for gradient in found.values())


def test_the_model_is_left_as_it_was():
    model = make_model("llama")
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    labelled = LabelledLoss(model)
    with pytest.raises(RuntimeError), labelled.installed():
        model(input_ids=torch.zeros(1, 1), labels=torch.zeros(1, 1))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 96)


def test_the_auxiliary_term_is_taken_after_the_forward_pass():
    model, batch = make_model("llama"), make_batch()
    ended = []
    model.get_base_model().register_forward_hook(lambda *args: ended.append(True))

    def auxiliary() -> torch.Tensor:
        assert ended
        return torch.tensor(0.25)

    labelled = LabelledLoss(model, auxiliary)
    ended.clear()
    with labelled.installed():
        _, term = model(**batch)
    assert term.item() == 0.25


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_in_reused_buffers_gives_the_loss_and_gradient_of_the_general_one(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a chunk is smaller than the others, and where a target is all but impossible."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 500, bias=bias, dtype=dtype).requires_grad_(False)
    head.weight[7] *= 400
    hidden, targets = torch.randn(23, 32).to(dtype).requires_grad_(), torch.randint(0, 500, (23,))
    targets[3] = 7
    assert loss_module.has_plain_head(head, loss_module.unchanged, hidden)
    general = loss_module.FrozenHeadLoss.apply(hidden, targets, head, loss_module.cross_entropy)
    (expected,) = torch.autograd.grad(general, hidden)
    monkeypatch.setattr(loss_module, "BUFFER_BYTES", 4 * 500 * 5)
    monkeypatch.setattr(loss_module, "PART_BYTES", 4 * 500 * 2)
    plain = loss_module.frozen_head_loss(hidden, targets, head, loss_module.unchanged)
    (found,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(plain, general)
    torch.testing.assert_close(found, expected, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_chunks_of_labelled_positions_are_few_and_even() -> None:
    assert [loss_module.chunk_of(positions, 320) for positions in (5, 300, 320, 321, 614, 961)] == [
        5, 300, 320, 192, 320, 256,
    ]  # fmt: skip


def test_buffers_of_a_plain_head_are_ones_that_glibc_keeps_a_place_for() -> None:
    """Above 32 MiB a buffer is mapped anew each time, page by page."""
    most = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            made = call(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                most = max(most, made.untyped_storage().nbytes())
            return made

    hidden = torch.empty(800, 8, dtype=torch.bfloat16, device="meta")
    head = torch.empty(49_152, 8, dtype=torch.bfloat16, device="meta")
    with Sizes():
        loss_module.PlainHeadLoss.apply(hidden, torch.empty(800, dtype=torch.long, device="meta"), head, None, False)
    assert 2**20 < most < 32 * 2**20


def test_a_head_that_is_more_than_one_product_is_computed_as_it_is() -> None:
    hidden, head = torch.randn(2, 8), torch.nn.Linear(8, 5)
    assert not loss_module.has_plain_head(head, lambda logits: logits * 2, hidden)
    assert not loss_module.has_plain_head(head, loss_module.unchanged, hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not loss_module.has_plain_head(head, loss_module.unchanged, hidden)
    handle = head.register_forward_hook(lambda module, args, output: output * 2)
    assert not loss_module.has_plain_head(head, loss_module.unchanged, hidden)
    handle.remove()
    assert loss_module.has_plain_head(head, loss_module.unchanged, hidden)
