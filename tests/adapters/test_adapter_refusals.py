"""What the queryable memory refuses, each with the reason; and the checks of its options."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qmemtune.adapters import QueryableMemoryConfig, apply_adapter
from qmemtune.adapters.queryable import QUERYABLE
from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.errors import UserError


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


class Experts(nn.Module):
    """A mixture with one linear layer an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.up_proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.up_proj(x) + self.experts[0](x)


def test_fused_experts_are_refused(llama):
    with pytest.raises(ValueError, match=r"experts.*mixture.*exclude_modules"):
        llama.adapted(base=mixtral(), target_modules=["q_proj", "experts"])


def test_single_experts_are_refused(llama):
    with pytest.raises(ValueError, match="expert of a mixture"):
        get_peft_model(Experts(), QueryableMemoryConfig(target_modules=["experts.0", "up_proj"]))


def test_a_mixtures_attention_is_adapted(llama):
    """all-linear leaves the experts out by itself where they are fused."""
    ids, base = llama.tokens(2, 7), mixtral()
    expected = llama.logits(base, ids)
    model = llama.adapted(base=base, stirred=False, target_modules=["q_proj", "v_proj", "o_proj"])
    assert torch.equal(llama.logits(model, ids), expected)


class Gated(nn.Module):
    """Decoder layers whose gate sees batch and tokens as one dimension, in a mixture's manner."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "gate": nn.Linear(8, 8)}) for _ in range(4)])

    def forward(self, x, gate_first=False):
        for layer in self.layers:
            if gate_first:
                x = x + layer["gate"](x.flatten(0, 1)).view_as(x).tanh()
                x = x + layer["q"](x).tanh()
            else:
                x = x + layer["q"](x).tanh()
                x = x + layer["gate"](x.flatten(0, 1)).view_as(x).tanh()
        return x


@pytest.mark.parametrize("gate_first", [False, True])
def test_a_gate_that_flattens_its_input(llama, gate_first):
    torch.manual_seed(0)
    model = llama.adapted(base=Gated(), task_type=None, target_modules=["q", "gate"])
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        full = model(x, gate_first)
        for row in range(3):
            torch.testing.assert_close(model(x[row : row + 1], gate_first)[0], full[row], rtol=1e-5, atol=1e-5)
        changed = x.clone()
        changed[:, 3] += 1
        torch.testing.assert_close(model(changed, gate_first)[:, :3], full[:, :3], rtol=1e-5, atol=1e-5)


def test_encoder_decoders_are_refused(llama):
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match=r"encoder-decoder.*LoRA"):
        llama.adapted(base=T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM", target_modules=["wi"])


def test_cross_attention_is_refused(llama):
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        is_decoder=True,
        add_cross_attention=True,
    )
    with pytest.raises(ValueError, match=r"cross-attention.*another sequence"):
        llama.adapted(base=BertLMHeadModel(config), target_modules=["query"])


def test_other_layers_are_refused(llama):
    with pytest.raises(ValueError, match="Embedding, which a queryable memory cannot adapt"):
        llama.adapted(target_modules=["embed_tokens"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"num_atoms": 0}, "num_atoms must be at least 1"),
        ({"key_dim": -1}, "key_dim must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"top_k": 0}, "top_k must be between 1 and num_atoms"),
        ({"top_k": 17}, "top_k must be between 1 and num_atoms"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"instruction_prior": 1.0, "prior_temperature": 0.0}, "prior_temperature must be above 0"),
        ({"init_core_std": -1.0}, "init_core_std must not be negative"),
        ({"instruction_prior": -1.0}, "instruction_prior must not be negative"),
        ({"prior_kl": 0.1}, "prior_kl has no effect"),
        ({"layers_pattern": "h"}, "layers_pattern has no effect"),
        ({"alpha": float("nan")}, "alpha"),
        ({"temperature": float("inf")}, "temperature"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(ValueError, match=named):
        QueryableMemoryConfig(**options)


def test_defaults():
    config = QueryableMemoryConfig(r=4)
    assert config.peft_type == QUERYABLE
    assert config.alpha == 8
    assert config.scaling == 2
    assert QueryableMemoryConfig(target_modules=["a", "b"]).target_modules == {"a", "b"}


@pytest.mark.parametrize("kind", [LoraConfig, QueryableConfig])
def test_targets_that_match_nothing(llama, kind):
    config = kind(target_modules=["q_porj", "v_proj"], exclude_modules=["nothing"], layers_to_transform=[1, 9])
    with pytest.raises(UserError) as error:
        apply_adapter(llama.base(), config, seed=0)
    found = {finding.where: finding for finding in error.value.findings}
    assert set(found) == {"adapter.target_modules", "adapter.exclude_modules", "adapter.layers_to_transform"}
    assert "q_porj" in found["adapter.target_modules"].problem
    assert "q_proj" in found["adapter.target_modules"].fix
    assert "9" in found["adapter.layers_to_transform"].problem


def test_a_refused_module_is_a_users_error(llama):
    base = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(UserError, match="encoder-decoder"):
        apply_adapter(base, QueryableConfig(target_modules=["wi"]), seed=0)
