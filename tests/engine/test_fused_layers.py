"""Layers in their fused forms: the numbers and gradients of the plain ones, for every base and adapter they serve."""

from __future__ import annotations

from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

from qmemtune.adapters.queryable import QueryableMemoryConfig
from qmemtune.engine.fused import fused_layers, low_rank
from qmemtune.engine.fused.mlp import gated_forward
from qmemtune.engine.fused.norm import norm_forward
from qmemtune.models.bitsandbytes import keep_4bit_trainable
from qmemtune.models.dequantized import dequantized_on_cpu

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
BASES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama_bias": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(**SMALL, head_dim=16),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


def adapted(name: str, kind: str, base: nn.Module | None = None, **options: object) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(BASES[name]) if base is None else base
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, 1.0, 0.2)
    common = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    config = (
        LoraConfig(**common) if kind == "lora" else QueryableMemoryConfig(**common, block_size=1, init_core_std=0.3)
    )
    model = get_peft_model(base, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or "queryable_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def numbers(model: PeftModel, *, fuse: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one pass."""
    model.zero_grad()
    autocast = nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    with fused_layers(model) if fuse else nullcontext():
        with autocast:
            logits = model(**batch(), use_cache=False).logits.float()
        logits[batch()["attention_mask"].bool()].log_softmax(-1)[:, 7].mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], rtol: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm() + 1e-9, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each pass through a fused adapted layer."""
    seen: list[str] = []
    real, joined = low_rank._BasesAndStates.apply, low_rank._AdaptedLayers.apply
    monkeypatch.setattr(low_rank._BasesAndStates, "apply", lambda *args: (seen.append("low_rank"), real(*args))[1])
    monkeypatch.setattr(low_rank._AdaptedLayers, "apply", lambda *args: (seen.append("low_rank"), joined(*args))[1])
    return seen


@pytest.mark.parametrize("kind", ["lora", "queryable"])
@pytest.mark.parametrize("name", BASES)
def test_numbers_and_gradients_of_the_plain_layers(calls: list[str], name: str, kind: str) -> None:
    model = adapted(name, kind)
    expected = numbers(model, fuse=False)
    assert not calls
    close(numbers(model, fuse=True), expected, rtol=2e-5)
    # GPT-2's layers are transformers' Conv1D, which are left as they are.
    assert bool(calls) == (name != "gpt2")


@pytest.mark.parametrize("kind", ["lora", "queryable"])
@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "q_proj"]])
def test_gate_and_up_go_through_one_node_where_both_are_adapted(calls: list[str], kind: str, targets: object) -> None:
    model = adapted("llama", kind, target_modules=targets)
    layers = BASES["llama"].num_hidden_layers
    numbers(model, fuse=True)
    # Queries, keys and values are another.
    assert len(calls) == layers * (4 if targets == "all-linear" else 2)


def test_somebody_elses_hook_on_a_layer_is_called(calls: list[str]) -> None:
    model = adapted("llama", "lora")
    expected = numbers(model, fuse=False)
    seen: list[Tensor] = []
    up = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.up_proj"))
    with up.register_forward_hook(lambda _, inputs, output: seen.append(output)):
        close(numbers(model, fuse=True), expected, rtol=2e-5)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_rounding_in_bfloat16_is_no_worse_than_that_of_the_plain_layers(kind: str) -> None:
    model = adapted("llama", kind)
    exact = numbers(model, fuse=False)[1]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()

    def distance(fuse: bool) -> float:
        found = numbers(model, fuse=fuse, dtype=torch.bfloat16)[1]
        return sum(((found[n] - g).norm() / g.norm()).item() for n, g in exact.items()) / len(exact)

    assert distance(fuse=True) <= 1.15 * distance(fuse=False)


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_four_bit_bases_through_their_dequantised_copies(calls: list[str], kind: str) -> None:
    torch.manual_seed(0)
    base = quantised(AutoModelForCausalLM.from_config(BASES["llama"]))
    keep_4bit_trainable(base)
    model = adapted("llama", kind, base.requires_grad_(False))
    with dequantized_on_cpu(model):
        expected = numbers(model, fuse=False)
        close(numbers(model, fuse=True), expected, rtol=2e-5)
        found = numbers(model, fuse=True)
    assert calls
    # Whether there is room for copies is another thing from run to run: the numbers must not be.
    without = numbers(model, fuse=True)
    assert torch.equal(found[0], without[0])
    assert all(torch.equal(found[1][name], without[1][name]) for name in without[1])


def quantised(base: nn.Module) -> nn.Module:
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            parent = base.get_submodule(name.rpartition(".")[0])
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name.rpartition(".")[2], layer.to("cpu"))
    return base


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_gradient_checkpointing(kind: str) -> None:
    model = adapted("llama", kind)
    expected = numbers(model, fuse=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close(numbers(model, fuse=True), expected, rtol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_dropout_switched_off_and_second_adapters_run_as_they_did(calls: list[str], kind: str) -> None:
    option = "lora_dropout" if kind == "lora" else "dropout"
    model = adapted("llama", kind, **{option: 0.3})
    torch.manual_seed(3)
    expected = numbers(model, fuse=False)
    torch.manual_seed(3)
    close(numbers(model, fuse=True), expected, rtol=2e-5)
    assert not calls, "an input that is dropped is not the base's"
    model.eval()
    with model.disable_adapter():
        expected_off = model(**batch(), use_cache=False).logits
        with fused_layers(model):
            off = model(**batch(), use_cache=False).logits
    torch.testing.assert_close(off, expected_off)
    assert not calls
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.eval()
    close(numbers(model, fuse=True), numbers(model, fuse=False), rtol=2e-5)


def test_dora_runs_as_it_did(calls: list[str]) -> None:
    model = adapted("llama", "lora", use_dora=True)
    close(numbers(model, fuse=True), numbers(model, fuse=False), rtol=2e-5)
    assert not calls


def test_without_gradients_and_afterwards_layers_are_what_they_were() -> None:
    model = adapted("llama", "lora")
    plain = {name: module.forward for name, module in model.named_modules() if "forward" in module.__dict__}
    with torch.no_grad():
        expected = model(**batch(), use_cache=False).logits
        with fused_layers(model):
            assert any("forward" in module.__dict__ for module in model.modules())
            with fused_layers(model):
                found = model(**batch(), use_cache=False).logits
    assert torch.equal(found, expected)
    assert {n: m.forward for n, m in model.named_modules() if "forward" in m.__dict__} == plain


def test_only_norms_that_compute_the_same_are_replaced() -> None:
    """Gemma's adds one to the weight; a trained one needs a gradient of its weight."""
    gemma = AutoModelForCausalLM.from_config(BASES["gemma2"]).requires_grad_(False)
    llama = AutoModelForCausalLM.from_config(BASES["llama"]).requires_grad_(False)
    assert norm_forward(llama.model.norm) is not None
    assert norm_forward(gemma.model.norm) is None
    assert norm_forward(nn.LayerNorm(8).requires_grad_(False)) is None
    llama.model.norm.weight.requires_grad_(True)
    assert norm_forward(llama.model.norm) is None


def test_only_gated_units_with_silu_are_replaced() -> None:
    gemma = AutoModelForCausalLM.from_config(BASES["gemma2"])
    llama = AutoModelForCausalLM.from_config(BASES["llama"])
    assert gated_forward(llama.model.layers[0].mlp) is not None
    assert gated_forward(gemma.model.layers[0].mlp) is None


class ScaledMLP(modeling_llama.LlamaMLP):
    """With a multiplier in between, as Falcon-H1's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x) * 0.9))


class ClampedMLP(modeling_llama.LlamaMLP):
    """With a limit, as Step's and DeepSeek's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


class WideMLP(modeling_llama.LlamaMLP):
    """With a product in float32."""

    def forward(self, x: Tensor) -> Tensor:
        opened = self.act_fn(self.gate_proj(x)).float() * self.up_proj(x).float() / 3 * 3.1
        return self.down_proj(opened.to(x.dtype))


@pytest.mark.parametrize("kind", [ScaledMLP, ClampedMLP, WideMLP])
def test_only_gated_units_that_compute_the_same_are_replaced(kind: type[nn.Module]) -> None:
    module = kind(BASES["llama"])
    state = torch.get_rng_state()
    assert gated_forward(module) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_rotary_embeddings_are_replaced_while_training_where_they_compute_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens in halves, as Llama has them; a function that computes otherwise stays."""
    plain = modeling_llama.apply_rotary_pos_emb
    model = adapted("llama", "lora")
    with fused_layers(model):
        assert modeling_llama.apply_rotary_pos_emb is not plain
        with fused_layers(model):
            pass
        assert modeling_llama.apply_rotary_pos_emb is not plain
    assert modeling_llama.apply_rotary_pos_emb is plain

    def other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return plain(q, k, sin, cos)

    other.__module__ = plain.__module__
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    with fused_layers(model):
        assert modeling_llama.apply_rotary_pos_emb is other


def test_what_can_be_made_again_is_not_kept() -> None:
    model = adapted("llama", "lora")

    def kept(fuse: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            fused_layers(model) if fuse else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            logits = model(**batch(), use_cache=False).logits
        del logits
        return sum(sizes.values())

    assert kept(fuse=True) < 0.6 * kept(fuse=False)


def test_two_backward_passes_through_one_graph() -> None:
    model = adapted("llama", "queryable")
    with fused_layers(model):
        loss = model(**batch(), use_cache=False).logits.square().mean()
        loss.backward(retain_graph=True)
        once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, once[name]), name


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_a_layer_without_tokens(kind: str) -> None:
    # An expert that no token was sent to.
    model = adapted("llama", kind)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.o_proj"))
    with fused_layers(model):
        if kind == "lora":
            found = layer(torch.zeros(0, 4, 64, requires_grad=True))
            found.sum().backward()
            assert found.shape == (0, 4, 64)
        ids = torch.zeros(0, 4, dtype=torch.long)
        assert model.get_input_embeddings()(ids).shape == (0, 4, 64)


def test_one_route_a_row_is_written_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = low_rank.through_route
    monkeypatch.setattr(
        low_rank, "through_route", lambda routed, z: (made.append(routed.data_ptr()), real(routed, z))[1]
    )
    model = adapted("llama", "queryable", granularity="row")
    with fused_layers(model), model.base_model.model.adapter_memory.prompted(torch.ones(3, 12, dtype=torch.bool)):
        model(**batch(), use_cache=False).logits.sum().backward()
    assert len(made) > 2
    assert len(set(made)) == BASES["llama"].num_hidden_layers


def test_a_route_is_float32_under_autocast() -> None:
    routed = torch.eye(4) + torch.randn(9, 4, 4, generator=torch.Generator().manual_seed(0)) * 1e-3
    z = torch.ones(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = low_rank.through_route(routed, z)
    torch.testing.assert_close(found, routed.sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [3, 16, 24])
@pytest.mark.parametrize("layers", [1, 3])
def test_layers_side_by_side_go_through_one_operator(layers: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    routed = torch.randn(9, rank, rank, generator=generator)
    states = torch.randn(9, layers * rank, generator=generator).to(dtype)
    each = states.float().split(rank, dim=1)
    forth = torch.cat([torch.einsum("nij,nj->ni", routed, z) for z in each], dim=1)
    back = torch.cat([torch.einsum("nji,nj->ni", routed, z) for z in each], dim=1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    with torch.autocast("cpu", torch.bfloat16):
        found = low_rank.through_route(routed, states), low_rank.back_through_route(routed, states)
    for result, expected in zip(found, (forth, back), strict=True):
        torch.testing.assert_close(result, expected.to(dtype), **tolerance)
