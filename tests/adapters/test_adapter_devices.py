"""A model that is spread over two devices; the meta device, which checks little by itself, stands for the second."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn

from qmemtune.adapters import QueryableMemoryConfig
from qmemtune.adapters.queryable.context import AdapterPass
from qmemtune.adapters.queryable.layer import QueryableLinear


class Spread(nn.Module):
    """Three layers, the second on another device; each reads its input where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.back = nn.Linear(6, 8), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8)

    def forward(self, x):
        state = self.near(x)
        return self.far(state.to("meta")), self.back(state)


def test_each_layer_of_a_block_gets_the_operator_where_it_is(monkeypatch):
    found = []
    real = QueryableLinear.routed

    def routed(self, name, x, z):
        operator = real(self, name, x, z)
        found.append((z.device.type, operator.device.type, operator.dtype))
        return operator

    monkeypatch.setattr(QueryableLinear, "routed", routed)
    config = QueryableMemoryConfig(r=4, num_atoms=4, key_dim=4, block_size=3, target_modules=["near", "far", "back"])
    model = get_peft_model(Spread(), config)
    model.base_model.model.far.to("meta")
    x = torch.randn(3, 6)
    model(x)
    expected = [("cpu", "cpu"), ("meta", "meta"), ("cpu", "cpu")]
    assert found == [(*devices, torch.float32) for devices in expected]
    found.clear()
    model.bfloat16()
    with torch.no_grad():
        model(x.bfloat16())
    # Without gradients the operator is kept in the layers' type, on one device at a time.
    assert found == [(*devices, torch.bfloat16) for devices in expected]


def test_divergences_of_blocks_on_two_devices_are_joined(llama):
    model = llama.adapted(instruction_prior=1.0, prior_kl=0.5)
    memory = llama.memory(model)

    def spread(module, args, kwargs):
        state = AdapterPass(divergences=[torch.zeros((), device="meta"), torch.ones(())])
        memory.holder.current.passes["default"] = state

    model.get_base_model().model.norm.register_forward_pre_hook(spread, with_kwargs=True)
    llama.logits(model, llama.tokens(2, 5))
    assert memory.divergence["default"].device.type == "meta"
