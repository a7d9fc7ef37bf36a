"""Queries, keys and values of one input from one node, and where they are not of one input."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qmemtune.adapters.queryable import QueryableMemoryConfig
from qmemtune.engine.fused import fused_layers, low_rank


class Attention(nn.Module):
    """Projections in the order and of the inputs that a test asks for."""

    def __init__(self, order: str = "qkv", other: str = "", inputs: int = 8) -> None:
        super().__init__()
        self.order, self.other = order, other
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(inputs, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0 if x.shape[-1] == self.k_proj.in_features else torch.cat([x, x[..., :1]], dim=-1)
        found = [getattr(self, f"{name}_proj")(y if name in self.other else x) for name in self.order]
        return torch.cat([value.tanh() for value in found], dim=-1)


class CrossAttention(Attention):
    """Of two inputs, by its name."""


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([attention])
        self.last = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def adapted(attention: nn.Module, kind: str, targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    config = (LoraConfig if kind == "lora" else QueryableMemoryConfig)(r=2, target_modules=targets)
    model = get_peft_model(Model(attention), config)
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
    "one input": (lambda: Attention(), ["q_proj", "k_proj", "v_proj"], [3]),
    "two of them adapted": (lambda: Attention(), ["q_proj", "v_proj"], [2]),
    "another order": (lambda: Attention("qvk"), ["q_proj", "k_proj", "v_proj"], [3]),
    "cross-attention by its name": (lambda: CrossAttention(other="kv"), ["q_proj", "k_proj", "v_proj"], [1, 1, 1]),
    "another width": (lambda: Attention(other="k", inputs=9), ["q_proj", "k_proj", "v_proj"], [1, 1, 1]),
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
        assert_close(numbers(model), expected)
        assert layers_a_node == nodes
    assert_close(numbers(model), expected)
    assert "forward" not in attention.q_proj.__dict__


@pytest.mark.parametrize("kind", ["lora", "queryable"])
@pytest.mark.parametrize(("order", "other"), [("qkv", "k"), ("qkv", "kv"), ("kqv", "")])
def test_inputs_that_turn_out_to_differ(layers_a_node: list[int], order: str, other: str, kind: str) -> None:
    model = adapted(Attention(order, other), kind, ["q_proj", "k_proj", "v_proj"])
    numbers(model)
    expected = numbers(model)
    with fused_layers(model):
        assert_close(numbers(model), expected)
        assert_close(numbers(model), expected)
        layers_a_node.clear()
        assert_close(numbers(model), expected)
    assert layers_a_node == [1, 1, 1]


def test_no_output_is_held_between_passes() -> None:
    attention = Attention()
    model = adapted(attention, "lora", ["q_proj", "k_proj", "v_proj"])
    with fused_layers(model):
        numbers(model)
        shared = model.base_model.model.layers[0].q_proj.forward.__closure__
        held = [cell.cell_contents for cell in shared if hasattr(cell.cell_contents, "layers")]
        assert [one._made for one in held] == [None]


def assert_close(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, msg=name)
