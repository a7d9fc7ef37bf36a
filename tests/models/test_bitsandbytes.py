from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.models.bitsandbytes import dequantised_weight, is_quantised, keep_4bit_trainable
from qmemtune.models.loading import load_base

IDS = torch.arange(1, 13).view(1, 12)


def repack(*args: object) -> None:
    raise AssertionError("the weights were repacked")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_no_layer_repacks_where_the_processor_could(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # What bitsandbytes does on a processor with AVX512-BF16, simulated on any.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", repack)
    model = load_base(ModelConfig(path=str(model_folder("llama"))), QuantizationConfig(kind=kind))
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        model.eval()(IDS)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert all(torch.equal(a, layer.weight.data) for a, layer in zip(before, layers, strict=True))


def test_the_simulation_would_notice(model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", repack)
    model = load_base(ModelConfig(path=str(model_folder("llama"))), QuantizationConfig("nf4"))
    model.model.layers[1].mlp.up_proj.support_avx512bf16_for_cpu = True
    with torch.no_grad(), pytest.raises(AssertionError, match="repacked"):
        model(IDS)
    assert keep_4bit_trainable(model) == 14
    with torch.no_grad():
        model(IDS)


def test_double_quantisation_is_an_option(model_folder: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(model_folder("llama")))
    for double in (True, False):
        model = load_base(config, QuantizationConfig("nf4", double_quant=double))
        assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested is double


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dequantising_leaves_the_layer_as_it_is(model_folder: Callable[[str], Path], kind: str) -> None:
    config = ModelConfig(path=str(model_folder("llama")), compute_dtype="float32")
    model = load_base(config, QuantizationConfig(kind=kind))
    layer = model.model.layers[0].mlp.up_proj
    assert is_quantised(layer)
    assert not is_quantised(model.lm_head)
    fresh = dequantised_weight(layer)
    x = torch.randn(4, 64)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(
            dequantised_weight(layer), fresh
        )  # also after a forward, which moves an 8-bit weight's parts
        assert torch.equal(layer(x), first)
    torch.testing.assert_close(x @ fresh.T, first, rtol=0, atol=1e-6 if kind == "nf4" else 0.02)
