"""An evaluation leaves no trace in the model, the random states or the training that follows."""

from __future__ import annotations

import copy
import random

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qmemtune.config.evaluation import EvaluationConfig, ExactMatchConfig, SamplesConfig
from qmemtune.data.collate import Collator
from qmemtune.errors import UserError
from qmemtune.evaluation.evaluate import draw_samples, evaluate
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.verb import by_itself, evaluate_pair, measure
from qmemtune.models.bitsandbytes import keep_4bit_trainable
from qmemtune.models.dequantized import dequantized_on_cpu

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def config(**options):
    return EvaluationConfig(per_device_eval_batch_size=4, exact_match=ExactMatchConfig(max_new_tokens=5), **options)


def to_4bit(model):
    """Replace the decoder's projections by 4-bit layers that bitsandbytes would repack on a suitable CPU."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, layer.to("cpu"))
    return model


def tuned(model, dropout=0.3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        options = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=dropout, init_lora_weights=False)
        return get_peft_model(model, options)


def train(model, tokenizer, rows, between):
    """Three steps with dropout; ``between`` runs after each."""
    torch.manual_seed(0)
    batch = {name: value for name, value in Collator(0)(rows[:4]).items() if name != "instruction"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    # One layer trains without dropout: it must still do so after an evaluation.
    model.base_model.model.model.layers[1].eval()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        between(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("four_bit", [False, True])
def test_training_with_evaluations_ends_bit_for_bit_as_without(tiny_llama_dir, tokenizer, rows, four_bit):
    from transformers import AutoModelForCausalLM

    def fresh():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
        return tuned(to_4bit(base) if four_bit else base)

    def between(model):
        evaluate(model, tokenizer, rows, config(), exact_match=True, **CPU)
        draw_samples(model, tokenizer, rows, config(samples=SamplesConfig(count=2, max_new_tokens=3)), **CPU)
        evaluate_pair(model, tokenizer, rows[:3], config(), **CPU)

    without, with_evaluations = (
        train(fresh(), tokenizer, rows, lambda model: None),
        train(fresh(), tokenizer, rows, between),
    )
    assert without.keys() == with_evaluations.keys()
    assert all(torch.equal(without[name], with_evaluations[name]) for name in without)


def test_modes_settings_and_random_states_return(llama, tokenizer, rows):
    model = tuned(llama).train()
    frozen = model.base_model.model.model.layers[1]
    frozen.eval()
    model.config.use_cache = False
    settings = model.generation_config
    modes = [module.training for module in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        random.random(), np.random.rand(), torch.rand(3)
        model.config.use_cache = True
        with model.disable_adapter():
            evaluate(model, tokenizer, rows, config(), exact_match=True, **CPU)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert model.config.use_cache is False
    assert model.generation_config is settings
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_all_returns_when_the_evaluation_fails(llama):
    llama.train()
    with pytest.raises(RuntimeError), undisturbed(llama):
        raise RuntimeError
    assert all(module.training for module in llama.modules())


def test_4bit_weights_are_not_repacked(llama, tokenizer, rows):
    model = to_4bit(llama)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = [layer.weight.data.clone() for layer in layers]
    evaluate(model, tokenizer, rows, config(), exact_match=True, **CPU)
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(layers, before, strict=True))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not any("forward" in layer.__dict__ for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_copies_give_the_same_bits(llama, rows, dtype):
    model = to_4bit(llama).eval()
    keep_4bit_trainable(model)
    batch = {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        live = model(**batch).logits
        with dequantized_on_cpu(model):
            first, second = model(**batch).logits, model(**batch).logits
        after = model(**batch).logits
    for found in (first, second, after):
        assert torch.equal(found, live)


def test_no_copies_without_room(llama, monkeypatch):
    monkeypatch.setattr("qmemtune.models.dequantized.MEMORY_SHARE", 0.0)
    model = to_4bit(llama)
    with dequantized_on_cpu(model):
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_evaluate_reports_and_respects_max_rows(llama, tokenizer, rows):
    news = []
    limited = config(max_rows=6)
    limited.exact_match.max_rows = 3
    result = evaluate(
        llama, tokenizer, rows, limited, exact_match=True, progress=lambda *facts: news.append(facts), **CPU
    )
    assert (len(result.losses), len(result.matches)) == (6, 3)
    assert news == [("loss", 4, 6), ("loss", 6, 6), ("exact match", 3, 3)]
    found = result.as_dict()
    assert (found["rows"], found["exact_match_rows"]) == (6, 3)
    assert evaluate(llama, tokenizer, rows, limited, exact_match=False, **CPU).matches is None
    assert evaluate(llama, tokenizer, rows, limited, exact_match=True, loss=False, **CPU).losses == []


def test_no_rows_is_an_error(llama, tokenizer):
    with pytest.raises(UserError, match="no held-out rows"):
        evaluate(llama, tokenizer, [], config(), exact_match=False, **CPU)


def test_a_pair_is_the_model_with_and_without_its_adapter(llama, tokenizer, rows):
    options = config()
    options.exact_match.enabled = True
    bare = by_itself(measure(llama, tokenizer, rows, options, **CPU), rows, options, tokenizer)
    model = tuned(llama).eval()
    alone = measure(model, tokenizer, rows, options, **CPU).as_dict()
    news = []
    found = evaluate_pair(model, tokenizer, rows, options, progress=lambda what, *_: news.append(what), **CPU)
    for ours, expected in ((found["base"], bare["tuned"]), (found["tuned"], alone)):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert ours["exact_match"] == expected["exact_match"]
        assert ours["groups"].keys() == {"even", "odd"}
    change = found["difference"]["loss"]
    assert change["difference"] == pytest.approx(alone["loss"] - bare["tuned"]["loss"], rel=1e-5)
    assert change["low"] <= change["difference"] <= change["high"]
    assert found["difference"]["groups"]["odd"]["loss"]["n"] == 6
    assert found["rows"] == 13
    assert [set(row) for row in found["examples"]] == [{"prompt", "expected", "base", "tuned"}] * 3
    assert found["examples"][0]["base"] == bare["examples"][0]["output"]
    assert {what.split(":")[0] for what in news} == {"base", "tuned"}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_of_an_initialisation_that_changes_it_is_loaded_anew(llama, tokenizer, rows, init):
    """Such an adapter takes its start out of the weights: what is left without it is no model of anybody's."""
    bare = measure(llama, tokenizer, rows, config(), **CPU).as_dict()
    fresh = copy.deepcopy(llama)
    model = get_peft_model(llama, LoraConfig(r=8, target_modules=["q_proj", "up_proj"], init_lora_weights=init)).eval()
    found = evaluate_pair(model, tokenizer, rows, config(), fresh_base=lambda: fresh, **CPU)
    assert found["base"]["loss"] == pytest.approx(bare["loss"], rel=1e-6)
    assert found["tuned"]["loss"] == pytest.approx(bare["loss"], rel=1e-4)
    with pytest.raises(ValueError, match="fresh_base"):
        evaluate_pair(model, tokenizer, rows, config(), **CPU)


def test_bfloat16_is_autocast(llama, tokenizer, rows):
    seen = []
    llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    evaluate(llama, tokenizer, rows[:2], config(), exact_match=True, device=CPU["device"], dtype=torch.bfloat16)
    assert set(seen) == {torch.bfloat16}
