"""Multimodal models: the towers of images get no gradient from text, so only the text decoder is adapted."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, PreTrainedModel

from qmemtune.adapters import apply_adapter, describe, memory_of
from qmemtune.adapters.build import check_targets, peft_config
from qmemtune.adapters.queryable.fold import least_squares_fold, mean_fold, mean_routes
from qmemtune.adapters.queryable.statistics import RouteStatistics, RouteUse
from qmemtune.config.adapters import LoraConfig, MethodConfig, QueryableConfig
from qmemtune.errors import UserError
from qmemtune.evaluation.routes import inspect_routes

LAYERS, TOWER_LAYERS = 4, 3
DECODER = "model.language_model."


def gemma3() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, **sizes}
    tower = {"image_size": 28, "patch_size": 14, **sizes}
    config = Gemma3Config(
        text_config={"num_hidden_layers": LAYERS, **text},
        vision_config={"num_hidden_layers": TOWER_LAYERS, **tower},
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert any("vision_tower" in name for name, _ in model.named_modules())
    return model


def adapted_names(model: PeftModel) -> set[str]:
    return set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4),
        QueryableConfig(r=4, block_size=1),
        MethodConfig(method="loha", r=4),
        MethodConfig(method="vera"),
    ],
    ids=["lora", "queryable", "loha", "vera"],
)
def test_all_linear_is_every_layer_of_the_text_decoder_and_survives_saving(config, tmp_path):
    base = gemma3()
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(DECODER)}
    model = apply_adapter(base, config, seed=0)
    assert adapted_names(model) == linear
    assert len(linear) == describe(model)["adapted_layers"] == 7 * LAYERS
    ids = torch.arange(1, 13).view(1, 12)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.save_pretrained(tmp_path)
    assert adapted_names(PeftModel.from_pretrained(gemma3(), str(tmp_path))) == linear


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]], ids=["all", "named"])
@pytest.mark.parametrize("kind", [LoraConfig, QueryableConfig])
def test_layers_are_those_of_the_text_decoder(kind, targets):
    config = kind(r=4, target_modules=targets, layers_to_transform=[1, 3], exclude_modules=["v_proj"])
    names = adapted_names(apply_adapter(gemma3(), config, seed=0))
    assert {name.removeprefix(DECODER).split(".")[1] for name in names} == {"1", "3"}
    assert all(name.startswith(f"{DECODER}layers.") for name in names)
    assert {name.rpartition(".")[2] for name in names} >= {"q_proj"}
    assert not any(name.endswith("v_proj") for name in names)


def test_targets_that_text_does_not_reach_are_refused():
    with pytest.raises(UserError, match="there is no decoder layer 4: the model has 4"):
        check_targets(gemma3(), LoraConfig(layers_to_transform=[LAYERS]))
    with pytest.raises(UserError, match="'fc1' matches no linear layer of the model's text decoder"):
        check_targets(gemma3(), LoraConfig(target_modules=["fc1"]))
    check_targets(gemma3(), LoraConfig(exclude_modules=["fc1"], layers_to_transform=[LAYERS - 1]))


def test_the_head_is_adapted_by_name_only():
    config = LoraConfig(r=4, target_modules=["lm_head", "o_proj"])
    names = adapted_names(apply_adapter(gemma3(), config, seed=0))
    assert "lm_head" in names
    assert len(names) == 1 + LAYERS


def test_a_model_of_text_keeps_pefts_own_all_linear(family):
    assert peft_config(LoraConfig(r=4), family.base()).target_modules == "all-linear"
    named = peft_config(LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1]), family.base())
    assert named.target_modules == {"q_proj"}
    assert named.layers_to_transform == [1]


@pytest.fixture
def with_tower(llama) -> PeftModel:
    """An adapter as older versions made them: blocks 0 to 2 belong to the tower, 3 to 6 to the text decoder."""
    config = llama.config(block_size=1, target_modules=r".*layers\.\d+\.self_attn\.(q|v)_proj")
    model = get_peft_model(gemma3(), config)
    llama.stir(model)
    assert memory_of(model).num_blocks("default") == TOWER_LAYERS + LAYERS
    return model.eval()


def test_blocks_keep_their_numbers_where_some_are_not_seen(with_tower, llama):
    ids = llama.tokens(2, 9)
    forwards = [lambda: with_tower(input_ids=ids)]
    routes = mean_routes(with_tower, forwards)
    assert sorted(routes) == [3, 4, 5, 6]
    folded = mean_fold(with_tower, forwards)
    assert folded.keys() == least_squares_fold(with_tower, forwards).keys()
    memory = memory_of(with_tower)
    core = memory.cores("default", memory.queryable_core["default"]).detach()
    for block, path in [(0, "model.vision_tower.encoder.layers.0"), (3, f"{DECODER}layers.0")]:
        layer = with_tower.base_model.model.get_submodule(f"{path}.self_attn.q_proj")
        assert layer.block["default"] == block
        operator = torch.eye(4)
        if block in routes:
            operator += torch.einsum("m,mij->ij", routes[block].float(), core)
        expected = operator @ layer.queryable_A["default"].weight.detach()
        torch.testing.assert_close(folded[f"{path}.self_attn.q_proj"].lora_A, expected)


def test_the_inspection_names_the_layers_of_the_blocks_that_were_seen(with_tower, llama, tiny_llama_dir):
    rows = [{"input_ids": row, "labels": row, "instruction": "", "group": ""} for row in llama.tokens(3, 7).tolist()]
    report = inspect_routes(
        with_tower,
        AutoTokenizer.from_pretrained(tiny_llama_dir),
        rows,
        source=None,
        has_prior=False,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_size=2,
    )
    assert [(block["block"], block["layers"]) for block in report["blocks"]] == [
        (TOWER_LAYERS + layer, [str(layer)]) for layer in range(LAYERS)
    ]
    assert report["tokens"] == 21
    assert sum(atom["use"] for atom in report["atoms"]) == pytest.approx(1.0)
    json.dumps(report)


def test_a_block_that_was_not_seen_says_nothing_about_the_router():
    statistics = RouteStatistics("default")
    even = torch.full((5, 4), 0.25)
    statistics("default", 2, even, None)
    table = statistics.table(torch.device("cpu"))
    assert table.shape == (3, 6)
    use = statistics.use(table)
    assert (use.seen, use.tokens) == ([2], 5)
    assert use.effective_atoms == pytest.approx([0.0, 0.0, 4.0])
    assert use.collapsed_blocks == []
    assert use.collapse() is None
    assert RouteUse([[0.0] * 4, [1.0, 0.0, 0.0, 0.0]], [0.0, 0.5], 5).collapsed_blocks == [1]
