"""Plain stacks of linear layers, without transformers' conventions."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from qmemtune.adapters import QueryableMemoryConfig, memory_of
from qmemtune.adapters.queryable.layer import QueryableLinear


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry, self.hidden, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.hidden(self.entry(x).tanh()).tanh())


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


STACKS = {
    "sequential": (sequential, ["0", "2", "4"]),
    "named": (Named, ["entry", "hidden", "out"]),
    "listed": (Listed, ["0", "1", "2", "3"]),
    "pattern": (Listed, r"layers\.\d"),
}


@pytest.mark.parametrize("block_size", [1, 2, 8])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_an_mlp_trains_saves_and_loads(stack, block_size, tmp_path):
    make, targets = stack
    torch.manual_seed(0)
    base = make()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    x = torch.randn(64, 6)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3]], dim=-1)
    expected = base(x)
    config = QueryableMemoryConfig(r=4, num_atoms=4, key_dim=4, block_size=block_size, target_modules=targets)
    model = get_peft_model(base, config)
    assert torch.equal(model(x), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if losses:
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    model.save_pretrained(tmp_path)
    fresh = make()
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(model(x[5:6])[0], model(x)[5], rtol=1e-5, atol=1e-6)
    blocks = [m.block["default"] for m in model.modules() if isinstance(m, QueryableLinear)]
    assert blocks == [index // block_size for index in range(len(blocks))]
    assert memory_of(model).num_blocks("default") == blocks[-1] + 1


def test_an_instruction_prior_needs_a_width_without_embeddings():
    with pytest.raises(ValueError, match="prior_dim"):
        get_peft_model(sequential(), QueryableMemoryConfig(target_modules=["0"], instruction_prior=1.0))
    config = QueryableMemoryConfig(target_modules=["0", "2"], block_size=1, instruction_prior=1.0, prior_dim=5)
    model = get_peft_model(sequential(), config)
    memory, x = memory_of(model), torch.randn(4, 6)
    nn.init.normal_(model.base_model.model[0].queryable_B["default"].weight)
    with torch.no_grad():
        without = model(x)
        given = F.normalize(torch.randn(4, 5), dim=-1)
        given[1] = 0
        with memory.instructed(given):
            changed = model(x)
    assert torch.equal(changed[1], without[1])
    assert not torch.equal(changed[0], without[0])
