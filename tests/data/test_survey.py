"""What ``qmemtune data`` counts."""

from __future__ import annotations

from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data.survey import length_histogram, survey

PASSAGE = "the old miller walked along the frozen river until he came to a small red house"


def test_a_survey_counts_lengths_loss_cuts_and_duplicates(write_rows, tokenizer):
    rows = [{"prompt": f"ask {i}", "completion": "word " * (i + 1)} for i in range(20)]
    rows += [rows[3], {**rows[4], "completion": "other"}]
    found = survey(DataConfig(path=write_rows(rows), eval_fraction=0.0, max_length=60), tokenizer, samples=2)
    train = found["train"]
    assert train["rows"] == sum(found["lengths"]["train"]) == 22
    assert found["loss_share"] == train["loss_tokens"] / train["tokens"]
    assert train["truncated"] > 0
    assert found["lengths"]["edges"][-1] >= train["longest"] == 60
    assert found["duplicates"] == {"same_row": 1, "same_prompt_other_answer": 2}
    first, second = found["samples"]
    assert (first["origin"][-2:], second["origin"][-3:]) == (":1", ":12")
    assert [(part["text"], part["loss"]) for part in first["parts"]] == [("ask 0", False), ("word <|im_end|>", True)]
    assert sum(part["tokens"] for part in second["parts"]) == second["tokens"]


def test_samples_are_of_every_set_of_a_mixture(write_rows, tokenizer):
    sources = {
        name: SourceConfig(path=write_rows([{"prompt": f"{name} {i}", "completion": "x"} for i in range(30)], name))
        for name in ("a.jsonl", "b.jsonl", "c.jsonl")
    }
    found = survey(DataConfig(sources=sources, eval_fraction=0.0), tokenizer, samples=3)
    assert {sample["parts"][0]["text"][0] for sample in found["samples"]} == {"a", "b", "c"}


def test_leaks_are_found_whatever_their_dress(write_rows, tokenizer):
    train = [{"prompt": f"question number {i}", "completion": "yes"} for i in range(5)]
    train += [
        {"prompt": "What IS the capital, of France?!", "completion": "Paris"},
        {"prompt": "tell me", "completion": f"Once {PASSAGE} and slept."},
        {"prompt": "question 9", "completion": "removed"},
    ]
    held = [
        {"prompt": "what is the capital of france", "completion": "Paris"},
        {"prompt": f"Go on: {PASSAGE}", "completion": "he knocked"},
        {"prompt": "question 9", "completion": "x"},
        {"prompt": "something else", "completion": "y"},
    ]
    config = DataConfig(path=write_rows(train), eval_path=write_rows(held, "held.jsonl"))
    found = survey(config, tokenizer)["leakage"]
    assert (found["removed"], found["same_words"], found["shared_passage"]) == (1, 1, 1)
    assert {(leak["kind"], leak["heldout"][-2:], leak["train"][-2:]) for leak in found["examples"]} == {
        ("same words", ":1", ":6"),
        ("shared passage", ":2", ":7"),
    }


def test_wording_that_many_rows_have_in_common_is_no_leak(write_rows, tokenizer):
    rows = [{"prompt": f"{PASSAGE} number {i}", "completion": "y"} for i in range(40)]
    found = survey(DataConfig(path=write_rows(rows), eval_fraction=0.1), tokenizer)["leakage"]
    assert (found["same_words"], found["shared_passage"]) == (0, 0)


def test_every_length_is_in_one_bin():
    for longest in (1, 2, 15, 16, 17, 1000):
        found = length_histogram(list(range(1, longest + 1)), [longest])
        assert (sum(found["train"]), sum(found["heldout"])) == (longest, 1)
        assert len(found["edges"]) == len(found["train"]) + 1
    assert sum(length_histogram([], [])["train"]) == 0
