"""The held-out split: disjoint, deterministic, free of leaks, and independent of how many rows are used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmemtune.config.data import DataConfig
from qmemtune.data.prepare import prepare_data, prepare_heldout
from qmemtune.errors import UserError


@pytest.fixture
def many(write_rows) -> DataConfig:
    rows = [{"prompt": f"ask {i}", "completion": f"answer {i}"} for i in range(100)]
    return DataConfig(path=write_rows(rows), eval_fraction=0.1)


def origins(rows) -> list[str]:
    return [row["origin"] for row in rows]


def test_the_split_is_disjoint_complete_and_deterministic(many, tokenizer):
    data, again = prepare_data(many, tokenizer), prepare_data(many, tokenizer)
    assert (len(data.train), len(data.heldout)) == (90, 10)
    assert not set(origins(data.train)) & set(origins(data.heldout))
    assert origins(data.heldout) == origins(again.heldout)
    assert origins(data.train) == origins(again.train)
    other = prepare_data(replace(many, split_seed=1), tokenizer)
    assert origins(other.heldout) != origins(data.heldout)


def test_the_number_of_rows_used_does_not_change_the_split(many, tokenizer):
    data = prepare_data(many, tokenizer)
    fewer = prepare_data(replace(many, max_train_rows=7, max_eval_rows=3), tokenizer)
    assert origins(fewer.train) == origins(data.train)[:7]
    assert origins(fewer.heldout) == origins(data.heldout)[:3]


def test_heldout_alone_is_the_same(many, tokenizer):
    data, alone = prepare_data(many, tokenizer), prepare_heldout(many, tokenizer)
    assert list(alone.heldout) == list(data.heldout)
    assert len(alone.train) == 0
    assert alone.format == "prompt_completion"


def test_rows_with_one_prompt_stay_on_one_side(write_rows, tokenizer):
    rows = [{"prompt": f"ask {i % 20}", "completion": f"answer {i}"} for i in range(60)]
    data = prepare_data(DataConfig(path=write_rows(rows), eval_fraction=0.25), tokenizer)
    sides = [{row["instruction"] for row in part} for part in (data.train, data.heldout)]
    assert not sides[0] & sides[1]
    assert len(data.heldout) == 15


def test_one_prompt_for_all_rows_is_split_by_row_with_a_warning(write_rows, tokenizer):
    rows = [{"prompt": "Write a poem.", "completion": f"poem {i}"} for i in range(20)]
    data = prepare_data(DataConfig(path=write_rows(rows), eval_fraction=0.1), tokenizer)
    assert (len(data.train), len(data.heldout)) == (18, 2)
    assert any("share prompts" in line for line in data.report.lines())


def test_prompts_that_run_into_their_completions_are_warned_about(write_rows, tokenizer):
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(8)]
    config = DataConfig(path=write_rows(rows), columns={"prompt": "question", "completion": "answer"})
    (line,) = [text for text in prepare_data(config, tokenizer).report.lines() if "run straight into" in text]
    assert "?It is" in line
    assert "data.prompt_template=$'{prompt}\\n'" in line
    for template in ("{prompt}\n", "<|user|>{prompt}<|assistant|>", "{prompt} ->"):
        apart = prepare_data(replace(config, prompt_template=template), tokenizer)
        assert not any("run straight into" in text for text in apart.report.lines())


def test_few_rows(write_rows, tokenizer):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(2)]
    data = prepare_data(DataConfig(path=write_rows(rows)), tokenizer)
    assert (len(data.train), len(data.heldout)) == (1, 1)
    data = prepare_data(DataConfig(path=write_rows(rows[:1])), tokenizer)
    assert (len(data.train), len(data.heldout)) == (1, 0)
    assert "none is held out" in data.report.warnings[0]


def test_prompts_of_a_held_out_file_are_not_trained_on(write_rows, tokenizer):
    rows = [{"prompt": f"ask {i}", "completion": "x"} for i in range(6)]
    path, eval_path = write_rows(rows), write_rows([{"prompt": "ask 2", "completion": "y"}, *rows[4:]], "dev.jsonl")
    data = prepare_data(DataConfig(path=path, eval_path=eval_path), tokenizer)
    assert [row["instruction"] for row in data.train] == ["ask 0", "ask 1", "ask 3"]
    assert len(data.heldout) == 3
    assert data.report.removed_as_heldout == 3
    assert any("3 training rows have the prompt of a held-out row" in line for line in data.report.lines())
    with pytest.raises(UserError, match="every training row"):
        prepare_data(DataConfig(path=path, eval_path=path), tokenizer)


def test_the_held_out_file_is_checked_as_well(write_rows, tokenizer):
    path = write_rows([{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="there are no rows"):
        prepare_data(DataConfig(path=path, eval_path=write_rows([], "dev.jsonl")), tokenizer)
    long = write_rows([{"prompt": "word " * 99, "completion": "b"}], "long.jsonl")
    with pytest.raises(UserError, match="no held-out row"):
        prepare_data(DataConfig(path=path, eval_path=long, max_length=32, max_rejected=1), tokenizer)
    with pytest.raises(UserError, match="a file has no splits"):
        prepare_data(DataConfig(path=path, eval_split="test"), tokenizer)


def test_the_report_counts_what_there_is(many, tokenizer):
    data = prepare_data(many, tokenizer)
    report = data.report.as_dict()
    assert report["train"]["tokens"] == sum(data.train.lengths) == sum(len(r["input_ids"]) for r in data.train)
    assert report["train"]["loss_tokens"] == sum(x != -100 for row in data.train for x in row["labels"])
    assert report["sources"] == [{"path": many.path, "format": "prompt_completion", "read": 100, "rejected": {}}]
    assert "train: 90 rows" in data.report.lines()[0]
    assert "held out: 10 rows" in data.report.lines()[1]


@pytest.mark.parametrize("options", [{"path": "???"}, {"path": "x.jsonl", "eval_fraction": 1.0}])
def test_options_that_make_no_sense(tokenizer, options):
    with pytest.raises(UserError):
        prepare_data(DataConfig(**options), tokenizer)


def test_options_without_effect_and_an_empty_held_out_part_are_warned_about(write_rows, tokenizer):
    rows = [{"prompt": "word " * 99 if i == 0 else f"ask {i}", "completion": "x"} for i in range(3)]
    config = DataConfig(path=write_rows(rows), name="main", max_length=32, max_rejected=1)
    for seed in range(20):
        data = prepare_data(replace(config, split_seed=seed), tokenizer)
        assert "data.name has no effect" in data.report.warnings[0]
        assert any("nothing can be evaluated" in text for text in data.report.warnings) == (not data.heldout)
        if not data.heldout:
            return
    raise AssertionError("no seed held out the long row")
