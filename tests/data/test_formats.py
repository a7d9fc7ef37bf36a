"""Row forms: what is prompt, what is answer, what is in the loss; verified by decoding."""

from __future__ import annotations

import inspect
from typing import get_args, get_type_hints

import pytest

from qmemtune.config.data import DataConfig
from qmemtune.data import formats
from qmemtune.data.formats import FORMS, Fields, RowError
from qmemtune.data.prepare import prepare_data
from qmemtune.errors import UserError

NO_EVAL = {"eval_fraction": 0.0}


def first(config: DataConfig, tokenizer):
    return prepare_data(config, tokenizer).train[0]


def test_every_function_with_a_row_is_a_form_and_the_schema_names_it():
    takes_row = {
        name
        for name, function in inspect.getmembers(formats, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["row"]
    }
    allowed = set(get_args(get_type_hints(DataConfig)["format"]))
    assert takes_row == set(FORMS)
    assert allowed == set(FORMS) | {"auto"}


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_form_says_which_column_is_missing(name):
    with pytest.raises(RowError, match=f"column '{FORMS[name].required[0]}' is missing"):
        FORMS[name].parse(Fields({"other": "x"}, {}))


def test_prompt_completion(write_rows, tokenizer, in_loss):
    path = write_rows([{"prompt": "Question: one?\nAnswer:", "completion": " two"}])
    prepared = prepare_data(DataConfig(path=path, **NO_EVAL), tokenizer)
    row = prepared.train[0]
    assert prepared.format == "prompt_completion"
    assert in_loss(row) == " two<|im_end|>"
    assert tokenizer.decode(row["prompt_ids"]) == "Question: one?\nAnswer:"
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    assert (row["answer"], row["instruction"], row["group"]) == (" two", "Question: one?\nAnswer:", "")
    assert row["origin"] == f"{path}:1"


def test_alpaca_with_and_without_input(write_rows, tokenizer, in_loss):
    path = write_rows(
        [
            {"instruction": "Add.", "input": "1 {2}", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "hi"},
            {"instruction": "Wave.", "input": None, "output": "o/"},
            {"instruction": "Nod.", "output": "ok"},
        ]
    )
    prepared = prepare_data(DataConfig(path=path, **NO_EVAL), tokenizer)
    texts = [tokenizer.decode(row["prompt_ids"]) for row in prepared.train]
    assert prepared.format == "alpaca"
    assert "### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n" in texts[0]
    assert all("### Input" not in text for text in texts[1:])
    assert texts[1].startswith("Below is an instruction that describes a task. Write a response")
    assert [in_loss(row) for row in prepared.train] == [f"{answer}<|im_end|>" for answer in ("3", "hi", "o/", "ok")]
    assert [row["instruction"] for row in prepared.train] == ["Add.", "Greet.", "Wave.", "Nod."]


def test_messages_have_every_assistant_turn_in_the_loss(write_rows, tokenizer, in_loss):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
    path = write_rows([{"messages": turns}])
    row = first(DataConfig(path=path, **NO_EVAL), tokenizer)
    assert in_loss(row) == "1<|im_end|>|2<|im_end|>"
    assert tokenizer.decode(row["prompt_ids"]) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (row["answer"], row["instruction"]) == ("2", "one?")


def test_alpaca_as_a_chat(write_rows, tokenizer, in_loss):
    path = write_rows([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    row = first(DataConfig(path=path, chat="always", system="Be exact.", **NO_EVAL), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == (
        "<|im_start|>system\nBe exact.<|im_end|>\n<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert in_loss(row) == "3<|im_end|>"


def test_templates_and_column_mapping(write_rows, tokenizer, in_loss):
    path = write_rows([{"question": "5 apples?", "answer": "five <<5=5>>apples", "level": 3}])
    config = DataConfig(
        path=path,
        columns={"completion": "answer"},
        prompt_template="Level {level} {{fix}}: {question}\nAnswer: ",
        remove_pattern=r"<<.*?>>",
        group_by="level",
        **NO_EVAL,
    )
    row = first(config, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "Level 3 {fix}: 5 apples?\nAnswer: "
    assert in_loss(row) == "five apples<|im_end|>"
    assert (row["answer"], row["group"]) == ("five apples", "3")


def test_two_templates_need_no_known_column(write_rows, tokenizer, in_loss):
    path = write_rows([{"frage": "wie?", "antwort": "so"}])
    config = DataConfig(path=path, prompt_template="{frage}\n", completion_template="= {antwort}", **NO_EVAL)
    assert in_loss(first(config, tokenizer)) == "= so<|im_end|>"


@pytest.mark.parametrize(
    ("choice", "expected"), [("user", "ask"), ("system", "Be kind."), ("column", "tagged"), ("none", "")]
)
def test_the_instruction_for_the_prior(write_rows, tokenizer, choice, expected):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "ok"}]
    path = write_rows([{"messages": turns, "tag": "tagged"}])
    config = DataConfig(
        path=path, instruction=choice, columns={"instruction": "tag"}, system="Be kind.", eval_fraction=0.0
    )
    assert first(config, tokenizer)["instruction"] == expected


def test_an_instruction_column_beside_prompt_and_completion_is_used(write_rows, tokenizer):
    path = write_rows([{"instruction": "Reverse", "prompt": "Reverse: a b", "completion": "b a", "family": "reverse"}])
    config = DataConfig(path=path, group_by="family", eval_fraction=0.0)
    row = first(config, tokenizer)
    assert (row["instruction"], row["group"]) == ("Reverse", "reverse")


def test_loss_on_all_covers_the_prompt_but_not_the_first_token(write_rows, tokenizer, in_loss):
    path = write_rows([{"prompt": "abc: ", "completion": "d"}])
    row = first(DataConfig(path=path, loss_on="all", **NO_EVAL), tokenizer)
    assert row["labels"][0] == -100
    assert row["labels"][1:] == row["input_ids"][1:]


def test_a_muted_assistant_message_is_context_only(write_rows, tokenizer, in_loss):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "right", "weight": 1},
    ]
    row = first(DataConfig(path=write_rows([{"messages": turns}]), system="S", **NO_EVAL), tokenizer)
    assert in_loss(row) == "right<|im_end|>"


def test_content_parts_are_joined(write_rows, tokenizer, in_loss):
    parts = [{"type": "text", "text": "so"}, {"type": "text", "text": " it is"}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]
    assert (
        in_loss(first(DataConfig(path=write_rows([{"messages": turns}]), **NO_EVAL), tokenizer)) == "so it is<|im_end|>"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["fit no row form", "question", "data.columns="]),
        ({"format": "alpaca"}, ["needs the column instruction and output", "the columns are question, answer"]),
        ({"columns": {"prompt": "questoin", "completion": "answer"}}, ["questoin", "did you mean 'question'?"]),
        ({"columns": {"promt": "question"}, "format": "prompt_completion"}, ["promt", "its fields are prompt"]),
        ({"prompt_template": "{questio}", "completion_template": "{answer}"}, ["questio", "did you mean 'question'?"]),
        ({"prompt_template": "{question", "completion_template": "{answer}"}, ["no partner", "'{{'"]),
        ({"prompt_template": "{}", "completion_template": "{answer}"}, ["no name"]),
        ({"columns": {"prompt": "question", "completion": "answer"}, "group_by": "lvl"}, ["lvl", "the columns are"]),
        ({"columns": {"prompt": "question", "completion": "answer"}, "remove_pattern": "("}, ["regular expression"]),
        ({"columns": {"prompt": "question", "completion": "answer"}, "instruction": "column"}, ["no row has"]),
    ],
)
def test_wrong_options_name_what_there_is(write_rows, tokenizer, options, words):
    path = write_rows([{"question": "a", "answer": "b"}])
    with pytest.raises(UserError) as caught:
        prepare_data(DataConfig(path=path, eval_fraction=0.0, **options), tokenizer)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rows_that_fit_two_forms_are_not_guessed(write_rows, tokenizer):
    path = write_rows([{"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}])
    with pytest.raises(UserError, match="more than one form"):
        prepare_data(DataConfig(path=path, eval_fraction=0.0), tokenizer)
    named = prepare_data(DataConfig(path=path, format="alpaca", eval_fraction=0.0), tokenizer)
    assert named.train[0]["answer"] == "d"


def test_templates_are_refused_for_conversations(write_rows, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match="do not apply to messages"):
        prepare_data(DataConfig(path=write_rows([{"messages": turns}]), prompt_template="{messages}"), tokenizer)
