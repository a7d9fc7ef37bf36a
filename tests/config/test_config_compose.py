"""What a command line composes to, where values come from, and every mistake reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmemtune.config.adapters import ADAPTERS
from qmemtune.config.compose import compose, to_yaml
from qmemtune.config.familiar import FAMILIAR
from qmemtune.config.fields import fields_of
from qmemtune.config.of_run import load_resolved
from qmemtune.errors import UserError

QUICK = "recipe=quickstart"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def findings(*overrides: str):
    with pytest.raises(UserError) as caught:
        compose(overrides)
    return caught.value.findings


def only(*overrides: str):
    found = findings(*overrides)
    assert len(found) == 1, found
    return found[0]


def test_overrides_beat_the_recipe_and_options_the_defaults():
    config = compose([QUICK, "trainer.max_steps=7", "quantization=fp4", "adapter=lora"]).config
    assert (config.trainer.max_steps, config.quantization.kind, config.adapter.kind) == (7, "fp4", "lora")
    assert config.recipe == "quickstart"


@pytest.mark.parametrize(
    "value",
    [
        "/data/a b/ü~x,(1)#2='3'.txt",
        "C:\\data\\n",
        "a=b=c",
        "~",
        "${x}",
        "你好",
        "[a",
        "{b",
        '"',
        '"in quotes"',
        "'(.+)'",
        "6e12345",
        "1.0",
        "a: b",
    ],
)
def test_text_values_need_no_quoting(value):
    composed = compose([QUICK, f"data.system={value}", f"model.tokenizer=hub/{value}"])
    assert composed.config.data.system == value
    assert composed.config.model.tokenizer == f"hub/{value}"


def test_values_survive_the_way_through_a_runs_config(tmp_path):
    overrides = [QUICK, "model.revision=6e12345", "data.system=${x} \\${y}\n- a: b", "data.remove_pattern=<<.*?>>\\d"]
    config = compose([*overrides, "+data.columns.prompt=1e5", "evaluation.tasks=[1e3,'a, b']"]).config
    path = write("run/config.yaml", to_yaml(config))
    assert load_resolved(path, []).config == config
    assert compose([f"recipe={path}"]).config == config


def test_plus_sets_entries_and_existing_keys_and_tilde_returns_to_the_default():
    gsm = "recipe=smollm2_gsm8k"
    config = compose([gsm, "+data.columns.system=sys", "+trainer.max_steps=3", "~optimizer.learning_rate"]).config
    assert config.data.columns == {"prompt": "question", "completion": "answer", "system": "sys"}
    assert config.trainer.max_steps == 3
    assert config.optimizer.learning_rate == 2e-4
    assert compose([gsm, "~data.columns.prompt"]).config.data.columns == {"completion": "answer"}
    assert compose([gsm, "~data.columns"]).config.data.columns == {}
    assert compose([gsm, "data.columns={a: b}"]).config.data.columns == {"a": "b"}


def test_tilde_group_returns_to_the_schema():
    assert compose([QUICK, "~quantization"]).config.quantization.kind == "none"


def test_without_a_recipe_the_defaults_and_given_groups_count():
    composed = compose(["model=smollm2_135m", "data=quickstart"])
    assert composed.recipe == "custom"
    assert composed.config.adapter.kind == "lora"
    assert composed.provenance["trainer.max_steps"] == "default"


def test_what_must_be_given_is_reported_together():
    assert {finding.problem.split()[0] for finding in findings()} == {"model.path", "data.path"}
    assert compose([], allow_missing=True).missing == ["model.path", "data.path"]


@pytest.mark.parametrize(
    "key",
    ["adapter.alpha", "adapter.dropout", "adapter.target_modules", "optimizer.betas", "data.format", "trainer.packing"],
)
def test_a_value_that_a_recipe_leaves_open_is_reported_whatever_its_type(key):
    section, name = key.split(".")
    write("recipes/mine.yaml", f"defaults: [/model: local, /data: quickstart, _self_]\n{section}:\n  {name}: ???\n")
    problems = [finding.problem for finding in findings("recipe=mine", "model.path=a/b")]
    assert problems == [f"{key} must be given"]


def test_provenance_names_file_override_or_default():
    write("recipes/mine.yaml", "defaults: [/model: local, /data: quickstart, _self_]\nmodel: {path: a/b}\n")
    composed = compose(["recipe=mine", "seed=3", "quantization=nf4"])
    assert composed.provenance["model.path"] == "recipes/mine.yaml"
    assert composed.provenance["seed"] == "seed=3"
    assert composed.provenance["quantization.kind"].endswith("conf/quantization/nf4.yaml")
    assert composed.provenance["optimizer.eps"] == "default"
    assert [setting.value for setting in composed.history["model.path"]] == ["???", "a/b"]


def test_users_conf_and_recipes_come_first():
    write("conf/model/smollm2_135m.yaml", "path: mine/model\n")
    write("conf/data/own.yaml", "path: generated:word_lists\n")
    write("recipes/quickstart.yaml", "defaults: [/model: smollm2_135m, /data: own, _self_]\nseed: 9\n")
    config = compose([QUICK]).config
    assert (config.model.path, config.data.path, config.seed) == ("mine/model", "generated:word_lists", 9)


def test_recipe_by_path_in_an_odd_folder_with_its_own_options():
    folder = 'odd "it\'s", d=1 ü'
    write(f"{folder}/model/here.yaml", "path: here/model\n")
    path = write(f"{folder}/my recipe.yaml", "defaults: [/model: here, /data: quickstart, _self_]\nseed: 4\n")
    composed = compose([f"recipe={path}"])
    assert (composed.config.model.path, composed.config.seed) == ("here/model", 4)
    assert composed.recipe == "my recipe"


def test_a_recipe_can_build_on_another():
    write("recipes/more.yaml", "defaults: [quickstart, {override /adapter: lora}, _self_]\nseed: 5\n")
    config = compose(["recipe=more"]).config
    assert (config.adapter.kind, config.seed, config.data.path) == ("lora", 5, "generated:word_lists")


def test_references_follow_overrides():
    write(
        "recipes/r.yaml",
        "defaults: [/model: smollm2_135m, /data: quickstart, _self_]\n"
        "evaluation: {every_steps: '${trainer.save_steps}'}\ntrainer: {save_steps: 50}\n"
        "tracking: {name: 'seed-${seed}', project: '\\${kept}'}\n",
    )
    config = compose(["recipe=r", "trainer.save_steps=20", "seed=3"]).config
    assert config.evaluation.every_steps == 20
    assert (config.tracking.name, config.tracking.project) == ("seed-3", "${kept}")


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${.x}", "${a", "${nothing.here}", "${now:%Y}"])
def test_no_resolver_reads_the_environment(text):
    write("recipes/r.yaml", f"defaults: [/model: smollm2_135m, /data: quickstart, _self_]\nrun_dir: '{text}'\n")
    found = only("recipe=r")
    assert found.where == "recipes/r.yaml:2"


def test_reference_that_leads_back_to_itself_is_reported():
    write(
        "recipes/r.yaml",
        "defaults: [/model: smollm2_135m, /data: quickstart, _self_]\n"
        "trainer: {save_steps: '${evaluation.every_steps}'}\nevaluation: {every_steps: '${trainer.save_steps}'}\n",
    )
    assert "leads back to itself" in findings("recipe=r")[0].problem


def test_all_mistakes_are_reported_at_once_with_the_nearest_names():
    write(
        "recipes/bad.yaml",
        "defaults:\n  - /model: smolm2_135m\n  - /optimiser: adamw\n  - _self_\ntrainer:\n  max_stps: 3\nseed: x\n",
    )
    found = {finding.where: finding for finding in findings("recipe=bad", "data=alpacca", "quantization.kind=nf5")}
    assert "did you mean smollm2_135m?" in found["recipes/bad.yaml:2"].fix
    assert found["recipes/bad.yaml:3"].fix == "did you mean optimizer?"
    assert found["recipes/bad.yaml:6"].fix == "did you mean trainer.max_steps?"
    assert "whole number" in found["recipes/bad.yaml:7"].problem
    assert "did you mean alpaca?" in found["data=alpacca"].fix
    assert found["quantization.kind=nf5"].fix == "did you mean nf4?"
    assert len(found) == 6


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("max_steps=3", "did you mean trainer.max_steps?"),
        ("adaptor=lora", "did you mean adapter?"),
        ("quantisation=nf4", "did you mean quantization?"),
        ("trainer.learning_rate=3", "did you mean optimizer.learning_rate?"),
        ("model=./folder", "did you mean model.path=./folder?"),
        ("model=org/name", "did you mean model.path=org/name?"),
        ("quickstart", "did you mean recipe=quickstart?"),
        ("optimizer.lr=1e-3", "did you mean optimizer.learning_rate?"),
        ("lora_alpha=16", "did you mean adapter.alpha?"),
        ("model_name_or_path=x", "did you mean model.path?"),
        ("load_in_4bit=true", "did you mean quantization=nf4?"),
        ("trainer={max_steps: 3}", "options: debug, default"),
    ],
)
def test_near_misses_are_answered_with_what_was_meant(override, fix):
    assert fix in str(only(QUICK, override).fix)


def test_a_recipe_without_its_key_is_the_only_thing_to_mend():
    """What the recipe would have given is not reported as missing beside it."""
    for name in ("quickstart", "mine.yaml"):
        with pytest.raises(UserError) as caught:
            compose([name])
        assert [finding.fix for finding in caught.value.findings] == [f"did you mean recipe={name}?"]


def test_names_of_other_tools_lead_to_keys_that_exist():
    keys = {key for kind in ADAPTERS for key in fields_of(kind)} | {"quantization", "resume"}
    assert {meant.partition("=")[0] for meant in FAMILIAR.values()} <= keys
    for meant in FAMILIAR.values():
        if "=" in meant:
            compose(["recipe=quickstart", meant])


def test_section_and_leaf_are_not_confused():
    assert "is a section" in only(QUICK, "evaluation.exact_match=true").problem
    assert "holds one value" in only(QUICK, "trainer.max_steps.x=1").problem


def test_key_of_the_other_adapter_says_so():
    found = only(QUICK, "adapter=lora", "adapter.num_atoms=4")
    assert found.problem == "adapter.num_atoms belongs to adapter=queryable, this is lora"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model:\n  _target_: os.system\n", "cannot name code"),
        ("hydra:\n  run: {dir: x}\n", "cannot configure Hydra"),
        ("seed: !!python/object/apply:os.system ['x']\n", "tag"),
        ("seed: [1\n", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("just text\n", "must be a mapping"),
        ("seed: 1\nseed: 2\n", "twice"),
        ("defaults: quickstart\n", "must be a list"),
        ("defaults: [/data: quickstart]\nseed: 1\n", "lacks _self_"),
        ("defaults: [missing_recipe]\n", "does not exist"),
        ("defaults: [r]\n", "leads back to itself"),
        ("a: &a {b: *a}\n", "holds itself"),
        ("a: " + "[" * 600 + "]" * 600, "nested too deeply"),
        (
            "x0: &x0 [a]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "too many",
        ),
        ("#" * (1 << 20) + "\nseed: 1\n", "too large"),
    ],
)
def test_bad_files_are_named(text, problem):
    write("recipes/r.yaml", text)
    found = [finding for finding in findings("recipe=r") if problem in finding.problem]
    assert found
    assert found[0].where.startswith("recipes/r.yaml")


def test_file_that_is_not_text():
    write("recipes/r.yaml", "")
    Path("recipes/r.yaml").write_bytes(b"seed: \xff\xfe")
    assert "not UTF-8" in only("recipe=r").problem


def test_an_option_that_the_recipe_overrules_is_warned_about():
    composed = compose([QUICK, "trainer=debug"])
    assert composed.config.trainer.max_steps == 110
    assert any("trainer=debug sets trainer.max_steps to 5" in line for line in composed.warnings)


def test_a_given_option_without_effect_is_warned_about_and_the_tools_own_recipes_give_none():
    (line,) = compose([QUICK, "data.split=validation"]).warnings
    assert line.startswith("data.split=validation: data.split has no effect")
    assert compose([QUICK]).warnings == []


def test_a_runs_config_takes_overrides_and_groups_but_keeps_its_adapter(tmp_path):
    path = write("run/config.yaml", to_yaml(compose([QUICK, "evaluation.max_rows=5", "seed=3"]).config))
    composed = load_resolved(path, ["evaluation=gsm8k", "seed=4"])
    assert composed.config.evaluation.exact_match.max_new_tokens == 256
    assert composed.config.evaluation.max_rows is None
    assert (composed.config.seed, composed.recipe) == (4, "quickstart")
    assert composed.warnings == []
    with pytest.raises(UserError) as caught:
        load_resolved(path, ["adapter.r=4", "recipe=quickstart", "adapter=lora"])
    assert len(caught.value.findings) == 3


def test_a_source_of_ones_own_sheds_what_belonged_to_the_recipes_source():
    write("rows.jsonl", "{}")
    gsm8k = compose(["recipe=smollm2_gsm8k"]).config.data
    assert (gsm8k.name, gsm8k.eval_split) == ("main", "test")
    composed = compose(["recipe=smollm2_gsm8k", "data.path=rows.jsonl"])
    data = composed.config.data
    assert (data.path, data.name, data.eval_split) == ("rows.jsonl", None, None)
    assert data.columns["prompt"] == "question"
    assert composed.warnings == []
    assert compose(["recipe=smollm2_gsm8k", "data.path=mirror/gsm8k"]).config.data.name == "main"
    write("recipes/r.yaml", "defaults: [/data: quickstart, _self_]\nmodel: {path: a/b, revision: v1}\n")
    assert compose(["recipe=r"]).config.model.revision == "v1"
    assert compose(["recipe=r", "model.path=c/d"]).config.model.revision is None
    assert compose(["recipe=r", "model.path=c/d", "model.revision=v2"]).config.model.revision == "v2"


def test_a_folder_of_ones_own_keeps_the_recipes_splits_where_it_has_some():
    def read(*files: str):
        for file in files:
            write(file, "{}")
        data = compose(["recipe=smollm2_gsm8k", f"data.path={Path(files[0]).parts[0]}"]).config.data
        return data.name, data.eval_split

    assert read("copy/train.jsonl", "copy/test.jsonl") == (None, "test")
    assert read("saved/dataset_dict.json", "saved/train/state.json", "saved/test/state.json") == (None, "test")
    # Held-out rows by another name are not passed over in silence: reading the rows asks for the split.
    assert read("named/train.jsonl", "named/dev.jsonl") == (None, "test")
    assert read("plain/part-1.jsonl", "plain/latest.jsonl") == (None, None)
    assert read("alone/train.jsonl") == (None, None)


def test_base_values_in_place_of_a_recipe():
    base = {
        "model": {"path": "a/b"},
        "data": {"path": "generated:word_lists"},
        "adapter": {"kind": "queryable", "r": 2},
    }
    composed = compose(["adapter.num_atoms=3"], base=base)
    assert (composed.config.adapter.r, composed.config.adapter.num_atoms) == (2, 3)
    assert composed.provenance["adapter.r"] == "base"
