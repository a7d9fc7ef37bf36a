"""What ``generate`` is fed equals the prompt of a training row, for every form."""

from __future__ import annotations

import pytest

from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.data.render import render_prompt
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
        ({"instruction": "ask", "input": "it", "output": "a"}, {"instruction": "ask", "input": "it"}, {}),
        ({"q": "ask", "completion": "answer"}, "ask", {"prompt_template": "Q: {q}\nA: "}),
        ({"q": "ask", "c": "on", "completion": "a"}, {"q": "ask", "c": "on"}, {"prompt_template": "{c} {q}:"}),
        ({"q": "ask", "n": 3, "completion": "a"}, {"q": "ask", "n": 3}, {"prompt_template": "{n} {q}:"}),
        ({"q": "ask", "completion": "a"}, {"q": "ask"}, {"columns": {"prompt": "q"}}),
        ({"messages": CHAT}, {"messages": CHAT[:1]}, {}),
        ({"messages": CHAT}, "ask <|im_end|>", {}),
        ({"messages": CHAT}, CHAT[:1], {}),
    ],
)
def test_render_prompt_is_the_training_prompt(write_rows, tokenizer, row, prompt, options, system):
    config = DataConfig(path=write_rows([row]), eval_fraction=0.0, system=system, **options)
    expected = prepare_data(config, tokenizer).train[0]["prompt_ids"]
    assert render_prompt(config, tokenizer, prompt) == expected


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
        ({"a": "x"}, {"prompt_template": "{a} {b}"}, "names 'b'"),
        ({"a": ["x"]}, {"prompt_template": "{a}"}, "column 'a' is a list"),
        ({"a": "x"}, {}, "no prompt"),
        ([], {}, "must end with a turn to answer"),
        (CHAT, {}, "must end with a turn to answer"),
        ([{"role": "robot", "content": "x"}], {}, "role is none of"),
    ],
)
def test_prompts_that_do_not_fit(tokenizer, prompt, options, words):
    with pytest.raises(UserError, match=words):
        render_prompt(DataConfig(path="gone.jsonl", **options), tokenizer, prompt)
