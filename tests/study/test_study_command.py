"""The command line that a study's tables name is the one that makes them."""

from __future__ import annotations

import pytest

from qmemtune.config.study import StudyConfig
from qmemtune.study.cells import command
from qmemtune.study.options import read_request
from qmemtune.study.run import plan_study
from qmemtune.study.studies import find_study, names


def command_for(name: str, *arguments: str) -> str:
    request = read_request(arguments)
    return command(find_study(name, request.options), request)


@pytest.mark.parametrize("name", names())
def test_a_study_as_it_is_needs_no_options(name):
    assert command_for(name) == f"qmemtune study {name}"
    study = find_study(name, StudyConfig())
    usual = study.default_variants or [variant.name for variant in study.variants]
    assert command_for(name, f"study.variants=[{','.join(usual)}]") == f"qmemtune study {name}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["study.variants=[lora,dora]", "study.settings=[r2]"],
        ["trainer.max_steps=4", "evaluation.max_rows=3"],
        ["study.variants=[lora,many]", "many:queryable", "many:adapter.num_atoms=64"],
    ],
)
def test_what_was_chosen_is_named(arguments):
    assert command_for("codes", *arguments) == " ".join(["qmemtune study codes", *arguments])


def test_seeds_and_folders_are_not_and_paths_are_cut():
    given = ["study.seeds=0-3", "study.jobs=2", "study_dir=/home/me/x", "study.learning_rates=[]"]
    assert (
        command_for("gsm8k", *given, "data.path=/home/me/train.jsonl") == "qmemtune study gsm8k data.path=train.jsonl"
    )


def test_ablations_on_another_task_have_a_place_of_their_own():
    on = "study.on=codes"
    assert command_for("ablations", on) == "qmemtune study ablations study.on=codes"
    folders = {
        str(plan_study("ablations", read_request([*more, "study.variants=[]", "study.seeds=[]"]))[1].path)
        for more in ([], [on])
    }
    assert folders == {"studies/ablations", "studies/ablations_codes"}
