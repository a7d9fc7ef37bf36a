"""Plans: cells, matched parameters, what the command line may ask for."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qmemtune.config.study import StudyConfig
from qmemtune.errors import UserError
from qmemtune.study.cells import Counted, decisive, is_run_of, make_plan
from qmemtune.study.options import read_request
from qmemtune.study.run import plan_study, trainable_parameters
from qmemtune.study.studies import find_study, names


def regression(*arguments):
    plan, _ = plan_study("regression", read_request(["study.seeds=[0]", "study.learning_rates=[]", *arguments]))
    return plan


def test_every_file_of_studies_is_a_study():
    assert {"ablations", "gsm8k", "instructions", "regression"} <= set(names())
    for name in names():
        study = find_study(name, StudyConfig())
        assert study.name == name
        assert len({variant.name for variant in study.variants}) == len(study.variants)
        assert {match.against for v in study.variants if (match := v.match)} <= {v.name for v in study.variants}


def test_an_unknown_study_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean regression\?"):
        find_study("regresion", StudyConfig())
    with pytest.raises(UserError, match=r"there is no study 'xyz' -> studies: ablations, "):
        find_study("xyz", StudyConfig())


@pytest.mark.parametrize("setting", ["ample", "little"])
@pytest.mark.parametrize("rank", [2, 4])
def test_lora_is_given_the_smallest_rank_with_at_least_the_memorys_parameters(setting, rank):
    plan = regression(f"study.settings=[{setting}]", f"queryable:adapter.r={rank}")
    lora, memory = (next(c for c in plan.cells if c.variant == name) for name in ("lora", "queryable"))
    assert lora.parameters >= memory.parameters
    lower = regression(f"study.settings=[{setting}]", "study.variants=[rank]", "rank:adapter=lora",
                       f"rank:adapter.r={lora.config.adapter.r - 1}")  # fmt: skip
    assert lower.cells[0].parameters < memory.parameters


def test_overrides_reach_all_runs_or_one_variants():
    plan = regression("trainer.max_steps=7", "queryable:adapter.num_atoms=3", "study.settings=[ample]")
    configs = {cell.variant: cell.config for cell in plan.cells}
    assert {config.trainer.max_steps for config in configs.values()} == {7}
    assert configs["queryable"].adapter.num_atoms == 3


def test_a_new_variant_is_like_a_known_one_with_changes():
    plan = regression(
        "study.variants=[queryable, many]", "many:queryable", "many:adapter.num_atoms=40", "study.settings=[little]"
    )
    many, memory = (next(c.config.adapter for c in plan.cells if c.variant == name) for name in ("many", "queryable"))
    assert (many.num_atoms, many.core_weight_decay) == (40, memory.core_weight_decay)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study.variants=[lorra]"], r"did you mean lora\?"),
        (["study.settings=[amples]"], r"did you mean ample\?"),
        (["study.seed=[1]"], r"did you mean study\.seeds\?"),
        (["study.dir=/tmp/x"], r"did you mean study_dir\?"),
        (["study.jobs=0"], "at least 1"),
        (["seed=3"], r"study\.seeds"),
        (["run_dir=x"], r"study_dir"),
        (["lora:seed=3"], r"study\.seeds"),
        (["lora:resume.path=auto"], "goes on where it stopped"),
        (["quaryable:adapter.r=3"], r"did you mean queryable\?"),
        (["more:querable", "study.variants=[more]"], r"did you mean queryable\?"),
        (["trainer.max_step=3"], r"did you mean trainer\.max_steps\?"),
    ],
)
def test_mistakes_are_named_with_the_way_out(arguments, message):
    with pytest.raises(UserError, match=message):
        regression(*arguments)


def test_seeds_may_be_a_range():
    assert read_request(["study.seeds=3-6"]).options.seeds == [3, 4, 5, 6]


def test_a_grid_adds_cells_and_shares_those_of_the_same_rate():
    request = read_request(
        ["study.seeds=0-1", "study.settings=[ample]", "study.learning_rates=[0.001, 0.1]", "study.grid_seeds=[0]",
         "optimizer.learning_rate=0.1", "study.variants=[queryable]"]
    )  # fmt: skip
    plan = make_plan(find_study("regression", request.options), request, trainable_parameters)
    assert [(cell.seed, cell.learning_rate) for cell in plan.cells] == [(0, 0.1), (0, 0.001), (1, 0.1)]


def test_a_digest_knows_what_changes_numbers():
    first, again, other = (regression("study.variants=[queryable]", *more).cells[0] for more in (
        [], ["tracking.project=x"], ["trainer.max_steps=9"]))  # fmt: skip
    assert first.digest == again.digest != other.digest


def test_a_run_from_before_an_option_existed_counts_while_the_option_has_its_default():
    cell = regression("study.variants=[queryable]").cells[0]
    earlier = decisive(cell.config)
    del earlier["trainer"]["profile"], earlier["adapter"]["top_k"]
    assert is_run_of(earlier, cell.config)
    assert not is_run_of(earlier, regression("study.variants=[queryable]", "adapter.top_k=3").cells[0].config)
    assert not is_run_of(earlier | {"no_longer_known": 1}, cell.config)
    assert not is_run_of(None, cell.config)


def test_ablations_change_one_thing_at_equal_parameters_where_they_say_so():
    plan, _ = plan_study("ablations", read_request(["study.seeds=[0]"]))
    parameters = {cell.variant: cell.parameters for cell in plan.cells}
    memory = parameters["queryable"]
    assert {parameters[name] for name in ("top_2", "block_atoms", "generated_core", "decay")} == {memory}
    assert parameters["fewer_atoms"] < memory < parameters["more_atoms"]
    assert parameters["lora"] >= memory


@pytest.mark.parametrize("on", get_args(get_type_hints(StudyConfig)["on"]))
def test_ablations_change_the_memory_as_the_study_that_they_are_on_has_it(on, monkeypatch, tmp_path):
    # What cannot be built is refused when its parameters are counted: atoms that the blocks cannot share. It depends on
    # the number of layers, which is SmolLM2's. Of the others only what is composed matters.
    shape = LlamaConfig(
        num_hidden_layers=30, hidden_size=32, intermediate_size=64, vocab_size=64, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    model = [] if on == "regression" else [f"model.path={tmp_path}"]
    request = [f"study.on={on}", "study.seeds=[0]", "study.variants=[block_atoms]", *model]
    plan_study("ablations", read_request(request))
    monkeypatch.setattr(Counted, "parameters", lambda *_: 0)
    monkeypatch.setattr(Counted, "search", lambda *_: "adapter.r=5")
    own, _ = plan_study(on, read_request(["study.variants=[queryable]", "study.seeds=[0]", "study.learning_rates=[]"]))
    plan, _ = plan_study("ablations", read_request([f"study.on={on}", "study.seeds=[0]"]))
    settings = {cell.setting for cell in plan.cells}
    assert len(settings) == 1
    base = next(cell.config.adapter for cell in own.cells if cell.setting in settings)
    adapters = {cell.variant: cell.config.adapter for cell in plan.cells}
    assert adapters["queryable"] == base
    assert adapters["fewer_atoms"].num_atoms == base.num_atoms // 4
    assert adapters["more_atoms"].num_atoms == 4 * base.num_atoms
    assert ("row_routes" in adapters) == (on != "regression")
    for name, adapter in adapters.items():
        if name not in ("queryable", "lora", "one_atom", "block_atoms"):
            changed = [key for key, value in vars(adapter).items() if value != getattr(base, key)]
            assert len(changed) == 1, name
