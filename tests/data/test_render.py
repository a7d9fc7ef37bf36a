"""What ``generate`` is fed equals the prompt of a training row, for every form."""

from __future__ import annotations

import pytest

from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.data.render import render_prompt, render_row
from qmemtune.errors import UserError

CHAT = [{"role": "user", "content": "ask <|im_end|>"}, {"role": "assistant", "content": "answer"}]


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize(
    ("row", "prompt", "options"),
    [
        ({"prompt": "ask", "completion": "answer"}, "ask", {}),
        ({"prompt": "ask", "completion": "answer"}, "ask", {"chat": "always"}),
        ({"instruction": "ask", "output": "answer"}, "ask", {}),
        ({"instruction": "ask", "output": "answer"}, "ask", {"chat": "always"}),
        ({"q": "ask", "completion": "answer"}, "ask", {"prompt_template": "Q: {q}\nA: "}),
        ({"messages": CHAT}, "ask <|im_end|>", {}),
        ({"messages": CHAT}, CHAT[:1], {}),
    ],
)
def test_render_prompt_is_the_training_prompt(write_rows, tokenizer, row, prompt, options, system):
    config = DataConfig(path=write_rows([row]), eval_fraction=0.0, system=system, **options)
    expected = prepare_data(config, tokenizer).train[0]["prompt_ids"]
    assert render_prompt(config, tokenizer, prompt) == expected


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize(
    ("row", "answer", "options"),
    [
        ({"prompt": "ask"}, "completion", {}),
        ({"prompt": "ask", "instruction": "task", "system": "Be brief."}, "completion", {}),
        ({"prompt": "ask", "instruction": "task"}, "completion", {"instruction": "column"}),
        ({"prompt": "ask", "t": "task"}, "completion", {"instruction": "column", "columns": {"instruction": "t"}}),
        ({"prompt": "ask"}, "completion", {"instruction": "none", "chat": "always"}),
        ({"instruction": "ask", "input": "it"}, "output", {}),
        ({"instruction": "ask", "input": "it", "system": "Be brief."}, "output", {"instruction": "system"}),
        ({"q": "ask", "c": "on"}, "completion", {"prompt_template": "{c} {q}:"}),
        ({"prompt": "ask", "c": "on"}, "completion", {"prompt_template": "{c} {prompt}:"}),
        ({"q": "ask", "n": 3}, "completion", {"prompt_template": "{n} {q}:"}),
        ({"q": "ask", "id": 7}, "completion", {"columns": {"prompt": "q"}}),
        ({"q": "ask"}, "a", {"columns": {"prompt": "q", "completion": "a"}, "completion_template": "{a}!"}),
        ({"messages": CHAT[:1], "system": "Be brief."}, "messages", {}),
        ({"messages": CHAT[:1], "tools": [TOOL]}, "messages", {}),
        ({"talk": CHAT[:1]}, "talk", {"columns": {"messages": "talk"}}),
        ({"conversations": [{"from": "human", "value": "ask"}]}, "conversations", {}),
    ],
)
def test_a_row_without_its_answer_gives_the_training_prompt(write_rows, chat_tokenizer, row, answer, options, system):
    tokenizer = chat_tokenizer(WITH_TOOLS)
    said = {"from": "gpt", "value": "a"} if answer == "conversations" else CHAT[-1]
    whole = row | {answer: [*row[answer], said] if isinstance(row.get(answer), list) else "a"}
    config = DataConfig(path=write_rows([whole]), eval_fraction=0.0, system=system, **options)
    trained = prepare_data(config, tokenizer).train[0]
    assert render_row(config, tokenizer, row) == (trained["prompt_ids"], trained["instruction"])


WITH_TOOLS = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_prompt_beside_columns_that_mean_nothing_is_the_prompt(tokenizer):
    config = DataConfig(path="gone.jsonl", format="alpaca")
    ids, instruction = render_row(config, tokenizer, {"prompt": "ask", "id": 7})
    assert (ids, instruction) == (render_prompt(config, tokenizer, "ask"), "ask")


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (
            {"a": "x"},
            {"prompt_template": "{a} {b}"},
            "there is no b, which .* -> give a, b, or a prompt; the row has a$",
        ),
        ({"a": ["x"]}, {"prompt_template": "{a}"}, "column 'a' is a list"),
        ({"a": float("nan")}, {"prompt_template": "{a}"}, "column 'a' is not a number"),
        ({"a": "x"}, {}, "there is no prompt, which .* -> give prompt; the row has a$"),
        ({"a": "x"}, {"columns": {"prompt": "q"}}, "give q, or a prompt; the row has a$"),
        ({"completion": "x"}, {}, "there is no prompt"),
        ({"a": "x"}, {"format": "text"}, "there is no text"),
        ({"text": 5}, {"format": "text"}, "column 'text' is a number"),
        ({"messages": CHAT}, {}, "must end with a turn to answer"),
        ({"messages": []}, {}, "must end with a turn to answer"),
    ],
)
def test_rows_that_do_not_fit(tokenizer, row, options, words):
    with pytest.raises(UserError, match=words):
        render_row(DataConfig(path="gone.jsonl", **options), tokenizer, row)


def test_a_plain_text_is_continued(tokenizer):
    config = DataConfig(path="gone.jsonl", format="text", columns={"text": "story"})
    assert render_row(config, tokenizer, {"story": "once upon"}) == (render_prompt(config, tokenizer, "once upon"), "")


def test_a_prompt_beside_the_answer_is_the_prompt(tokenizer):
    config = DataConfig(path="gone.jsonl", format="alpaca")
    ids, _ = render_row(config, tokenizer, {"prompt": "ask", "output": "answer"})
    assert ids == render_prompt(config, tokenizer, "ask")


def test_of_several_sets_the_first_ones_prompts(write_rows, tokenizer):
    path = write_rows([{"q": "ask", "completion": "answer"}])
    first = SourceConfig(path=path, prompt_template="Q: {q}\nA: ")
    other = SourceConfig(path=path, prompt_template="{q}?")
    config = DataConfig(sources={"first": first, "other": other}, eval_fraction=0.0)
    assert tokenizer.decode(render_prompt(config, tokenizer, "ask")) == "Q: ask\nA: "


def test_the_form_can_be_named_when_the_data_are_gone(write_rows, tokenizer):
    config = DataConfig(path="gone.jsonl")
    assert tokenizer.decode(render_prompt(config, tokenizer, "ask")) == "ask"
    assert "### Instruction:\nask" in tokenizer.decode(render_prompt(config, tokenizer, "ask", form="alpaca"))


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ("x", {"prompt_template": "{a} {b}"}, "several fields"),
        ([], {}, "must end with a turn to answer"),
        (CHAT, {}, "must end with a turn to answer"),
        ([{"role": "robot", "content": "x"}], {}, "role is none of"),
    ],
)
def test_prompts_that_do_not_fit(tokenizer, prompt, options, words):
    with pytest.raises(UserError, match=words):
        render_prompt(DataConfig(path="gone.jsonl", **options), tokenizer, prompt)
