"""Queries, keys and values of one input from one node, and where they are not of one input."""

from __future__ import annotations

import gc
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from qmemtune.adapters.queryable import QueryableMemoryConfig
from qmemtune.engine.fused import fused_layers, low_rank
from qmemtune.engine.fused.projections import asks_one_input

ALL = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(inputs, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x).tanh(), self.k_proj(x).tanh(), self.v_proj(x).tanh()], dim=-1)


class OtherWidth(Attention):
    def __init__(self) -> None:
        super().__init__(9)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, x[..., :1]], dim=-1)
        return torch.cat([self.q_proj(x).tanh(), self.k_proj(y).tanh(), self.v_proj(x).tanh()], dim=-1)


class Cross(Attention):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        return torch.cat([self.q_proj(x).tanh(), self.k_proj(y).tanh(), self.v_proj(y).tanh()], dim=-1)


class KeysFirst(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.k_proj(x).tanh(), self.q_proj(x).tanh(), self.v_proj(x).tanh()], dim=-1)


class Changing(Attention):
    """One name, and another tensor behind it."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.q_proj(x).tanh()
        x = x * 2.0
        return torch.cat([first, self.k_proj(x).tanh(), self.v_proj(x).tanh()], dim=-1)


class Normed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x.sin()), self.k_proj(x.cos()), self.v_proj(x.tanh())], dim=-1)


class Model(nn.Module):
    def __init__(self, attention: nn.Module, recomputed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([attention])
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed:
            return checkpoint(self.layers[0], x, use_reentrant=False)
        return self.layers[0](x)


def adapted(attention: nn.Module, kind: str, targets: list[str], recomputed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = (LoraConfig if kind == "lora" else QueryableMemoryConfig)(r=2, target_modules=targets)
    model = get_peft_model(Model(attention, recomputed), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "queryable_B" in name:
            nn.init.normal_(parameter)
    return model.train()


def numbers(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    result = model(x)
    result.square().sum().backward()
    return result.detach(), x.grad, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def layers_a_node(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each node was of."""
    seen: list[int] = []
    for node in (low_rank._AdaptedLayers, low_rank._BasesAndStates):
        real = node.apply
        monkeypatch.setattr(node, "apply", lambda *args, real=real: (seen.append(len(args[1])), real(*args))[1])
    return seen


CASES = {
    "one input": (Attention, ALL, [3]),
    "two of them adapted": (Attention, ["q_proj", "v_proj"], [2]),
    "another width": (OtherWidth, ALL, [1, 1, 1]),
    "cross-attention": (Cross, ALL, [1, 1, 1]),
    "keys first": (KeysFirst, ALL, [1, 1, 1]),
    # All are made with the first, and then two anew.
    "another tensor of one name": (Changing, ALL, [3, 1, 1]),
    "of something made of it": (Normed, ALL, [1, 1, 1]),
}


@pytest.mark.parametrize("kind", ["lora", "queryable"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_and_gradients(layers_a_node: list[int], name: str, kind: str) -> None:
    make, targets, nodes = CASES[name]
    attention = make()
    model = adapted(attention, kind, targets)
    numbers(model)  # a memory measures its inputs
    expected = numbers(model)
    with fused_layers(model):
        for _ in range(2):
            layers_a_node.clear()
            assert_close(numbers(model), expected)
            assert layers_a_node == nodes
    assert_close(numbers(model), expected)
    assert "forward" not in attention.q_proj.__dict__
    assert not attention._forward_hooks


@pytest.mark.parametrize("name", CASES)
def test_recomputation_does_the_same(name: str) -> None:
    make, targets, _ = CASES[name]
    model = adapted(make(), "lora", targets, recomputed=True)
    expected = numbers(model)
    with fused_layers(model):
        for _ in range(2):
            assert_close(numbers(model), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_no_output_is_held_behind_a_pass(fails: bool) -> None:
    class Stopped(Attention):
        def forward(self, x: Tensor) -> Tensor:
            queries = self.q_proj(x)
            if fails:
                raise RuntimeError("in between")
            if len(x) > 100:
                return self.k_proj(x), self.v_proj(x)
            return queries

    model = adapted(Stopped(), "lora", ALL)
    with fused_layers(model):
        x = torch.randn(2, 31, 8)
        with suppress(RuntimeError):
            model(x)
        gc.collect()
        held = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.shape[:2] == (2, 31) and t is not x]
        assert held == []


def test_layers_of_transformers() -> None:
    assert asks_one_input(LlamaAttention.forward)
    assert asks_one_input(Qwen3Attention.forward)


def assert_close(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, msg=name)
