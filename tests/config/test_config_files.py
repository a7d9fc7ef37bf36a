"""Every YAML that ships: read by the schema, and merged as Hydra itself merges it."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from qmemtune.config.adapters import ADAPTERS
from qmemtune.config.compose import compose
from qmemtune.config.fields import fields_of
from qmemtune.config.places import list_groups, list_options, list_recipes, own_folder
from qmemtune.config.settings import flatten

RECIPES = sorted(list_recipes())
OPTIONS = [(group, option) for group in list_groups() for option in list_options(group)]
GROUPS = ["adapter", "data", "evaluation", "export", "model", "optimizer", "quantization", "tracking", "trainer"]


@pytest.mark.parametrize("name", ["hydra", "_dummy_rows"])
def test_a_recipe_may_be_called_like_files_of_hydra(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.yaml").write_text("defaults: [_self_]\nmodel: {path: x/y}\ndata: {path: c/d}\nseed: 7\n")
    assert compose([f"recipe=./{name}.yaml"]).config.seed == 7


def test_groups_are_the_schemas_sections():
    assert list_groups() == GROUPS


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_says_only_what_differs_from_the_defaults(group, option):
    kind = option if group == "adapter" else "lora"
    text = (own_folder("conf") / group / f"{option}.yaml").read_text()
    assert text.startswith("# ")
    composed = compose([f"{group}={option}"], allow_missing=True)
    fields = fields_of(kind)
    for setting in flatten(yaml.safe_load(text) or {}, "file", f"{group}."):
        field = fields.get(setting.key)
        same = field is not None and field.default == setting.value
        # An option may spell out what it is named for.
        assert not same or setting.value in (option, "???"), f"{setting.key} is the default"
        assert setting.key in composed.provenance


@pytest.mark.parametrize(("recipe", "adapter"), itertools.product(RECIPES, ADAPTERS))
def test_recipe_composes_with_every_adapter(recipe, adapter):
    composed = compose([f"recipe={recipe}", f"adapter={adapter}"])
    assert composed.config.adapter.kind == adapter
    assert composed.config.description
    assert composed.config.needs
    assert composed.warnings == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_header_gives_its_command_and_hardware(recipe):
    text = (own_folder("recipes") / f"{recipe}.yaml").read_text()
    header = text[: text.index("defaults:")]
    assert f"qmemtune train recipe={recipe}" in header
    assert re.search(r"Hardware: .*Result: ", header, re.S)


CASES = [
    [],
    ["adapter=lora"],
    ["trainer=debug", "quantization=int8"],
    ["+tracking=wandb", "+export=lora"],
    ["data=gsm8k", "evaluation=gsm8k"],
    ["~quantization"],
]


# A regression has neither text nor a quantised base: see test_config_checks.
LANGUAGE_ONLY = [["trainer=debug", "quantization=int8"], ["data=gsm8k", "evaluation=gsm8k"]]
MERGED = [
    (recipe, case)
    for recipe, case in itertools.product(RECIPES, CASES)
    if recipe != "regression_noisy" or case not in LANGUAGE_ONLY
]


@pytest.mark.parametrize(("recipe", "overrides"), MERGED)
def test_merge_equals_hydras_own(recipe, overrides):
    with initialize_config_dir(str(own_folder("recipes")), version_base="1.3"):
        reference = hydra_compose(recipe, [f'hydra.searchpath=["file://{own_folder("conf")}"]', *overrides])
    expected = {s.key: s.value for s in flatten(OmegaConf.to_container(reference), "hydra") if s.value != {}}
    composed = compose([f"recipe={recipe}", *overrides])
    ours = {key: settings[-1].value for key, settings in composed.history.items() if key != "recipe"}
    assert ours == expected
