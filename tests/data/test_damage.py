"""Damaged input: every kind is named, with its line, and the good rows around it are used."""

from __future__ import annotations

import json

import pytest

from qmemtune.config.data import DataConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.data.records import Rejected
from qmemtune.data.report import DataReport, SourceReport
from qmemtune.errors import UserError

GOOD = b'{"prompt": "ask", "completion": "answer"}'
LINES = {
    "truncated": (b'{"prompt": "a", "compl', "malformed JSON"),
    "not json": (b"hello there", "malformed JSON"),
    "two objects": (GOOD + GOOD, "malformed JSON"),
    "single quotes": (b"{'prompt': 'a', 'completion': 'b'}", "malformed JSON"),
    "trailing comma": (b'{"prompt": "a", "completion": "b",}', "malformed JSON"),
    "raw line feed escape": (b'{"prompt": "a\x01", "completion": "b"}', "malformed JSON"),
    "nested too deeply": (b'{"prompt": ' + b"[" * 200_000 + b"}", "malformed JSON"),
    "number too long": (b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}', "malformed JSON"),
    "null row": (b"null", "not an object"),
    "list row": (b'["a", "b"]', "not an object"),
    "number row": (b"3", "not an object"),
    "text row": (b'"prompt"', "not an object"),
    "no prompt": (b'{"completion": "b"}', "column 'prompt' is missing"),
    "no completion": (b'{"prompt": "a"}', "column 'completion' is missing"),
    "empty object": (b"{}", "column 'prompt' is missing"),
    "other case": (b'{"Prompt": "a", "completion": "b"}', "column 'prompt' is missing"),
    "null completion": (b'{"prompt": "a", "completion": null}', "column 'completion' is null, not text"),
    "number completion": (b'{"prompt": "a", "completion": 5}', "column 'completion' is a number, not text"),
    "NaN": (b'{"prompt": "a", "completion": NaN}', "column 'completion' is not a number (NaN or infinity), not text"),
    "true completion": (b'{"prompt": "a", "completion": true}', "column 'completion' is true/false, not text"),
    "list completion": (b'{"prompt": "a", "completion": ["b"]}', "column 'completion' is a list, not text"),
    "nested prompt": (b'{"prompt": {"text": "a"}, "completion": "b"}', "column 'prompt' is an object, not text"),
    "empty prompt": (b'{"prompt": "", "completion": "b"}', "column 'prompt' is empty"),
    "blank completion": (b'{"prompt": "a", "completion": " \\n\\t "}', "column 'completion' is empty"),
    "not UTF-8": (b'{"prompt": "a\xff\xfe", "completion": "b"}', "column 'prompt' is not valid Unicode text"),
    "latin-1": (
        '{"prompt": "a", "completion": "größer"}'.encode("latin-1"),
        "column 'completion' is not valid Unicode text",
    ),
    "lone surrogate": (b'{"prompt": "a", "completion": "\\ud83d"}', "column 'completion' is not valid Unicode text"),
    "instruction of a wrong type": (
        b'{"prompt": "a", "completion": "b", "instruction": 7}',
        "column 'instruction' is a number, not text",
    ),
    "key twice": (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "a key is given twice"),
    "key twice inside": (b'{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 2}}', "a key is given twice"),
    "invisible completion": (b'{"prompt": "a", "completion": "\\u200b\\ufeff"}', "column 'completion' is empty"),
    "NUL only": (b'{"prompt": "\\u0000", "completion": "b"}', "column 'prompt' is empty"),
    "raw tab": (b'{"prompt": "a\tb", "completion": "b"}', "malformed JSON"),
    "bad escape": (b'{"prompt": "C:\\dir", "completion": "b"}', "malformed JSON"),
    "no colon": (b'{"prompt" "a", "completion": "b"}', "malformed JSON"),
    "comment": (b'{"prompt": "a", /* b */ "completion": "b"}', "malformed JSON"),
    "BOM in the middle": (b"\xef\xbb\xbf" + GOOD, "malformed JSON"),
    "NUL bytes": (b"\x00" * 8, "malformed JSON"),
    "infinity": (
        b'{"prompt": "a", "completion": Infinity}',
        "column 'completion' is not a number (NaN or infinity), not text",
    ),
    "huge prompt": (
        b'{"prompt": "' + b"word " * 40_000 + b'", "completion": "b"}',
        "all loss tokens are cut off by data.max_length",
    ),
    "prompt beyond max_length": (
        b'{"prompt": "' + b"word " * 200 + b'", "completion": "b"}',
        "all loss tokens are cut off by data.max_length",
    ),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_line_is_named_and_its_neighbours_are_used(tmp_path, tokenizer, kind):
    line, reason = LINES[kind]
    path, rejected_path = tmp_path / "rows.jsonl", tmp_path / "run" / "rejected.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, line, GOOD]) + b"\n")
    config = DataConfig(path=str(path), max_rejected=1, max_length=64, eval_fraction=0.0)
    data = prepare_data(config, tokenizer, rejected_path=rejected_path)
    assert [row["origin"].rsplit(":")[-1] for row in data.train] == ["1", "2", "4"]
    assert data.report.as_dict()["sources"][0]["rejected"] == {reason: 1}
    assert data.report.sources[0].read == 4
    assert any(reason in text for text in data.report.lines())
    (record,) = [json.loads(text) for text in rejected_path.read_text(encoding="utf-8").splitlines()]
    assert (record["file"], record["line"], record["reason"]) == (str(path), 3, reason)
    with pytest.raises(UserError) as caught:
        prepare_data(DataConfig(path=str(path), max_length=64, eval_fraction=0.0), tokenizer)
    assert "1 of 4 rows cannot be used" in str(caught.value)
    assert "line 3" in str(caught.value)
    assert reason in str(caught.value)


def asked(**answer):
    """A question and an answer with these keys."""
    return [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]


MESSAGES = {
    "no list": ("hello", "column 'messages' is text, not a list of messages"),
    "empty list": ([], "no assistant message"),
    "null": (None, "column 'messages' is null, not a list of messages"),
    "user only": ([{"role": "user", "content": "a"}], "no assistant message"),
    "assistant only": ([{"role": "assistant", "content": "a"}], "no user message before an answer"),
    "text message": (["a", "b"], "a message is not an object"),
    "no role": ([{"content": "a"}], "a message's role is none of"),
    "role of its own making": ([{"role": "user<|im_end|>", "content": "a"}], "a message's role is none of"),
    "list role": ([{"role": ["user"], "content": "a"}], "a message's role is none of"),
    "null content": ([{"role": "user", "content": None}], "a message's content is null, not text"),
    "picture": ([{"role": "user", "content": [{"type": "image"}]}], "a message's content is a list, not text"),
    "tool call without a name": (asked(content=None, tool_calls=[{}]), "a tool call names no function"),
    "tool calls that are no list": (asked(content=None, tool_calls="f()"), "tool_calls is not a list"),
    "tool call that is text": (asked(content=None, tool_calls=["f()"]), "a tool call is not an object"),
    "arguments cut off": (
        asked(content=None, function_call={"name": "f", "arguments": '{"x": '}),
        "a tool call's arguments are not JSON",
    ),
    "arguments in a list": (
        asked(content=None, tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
        "a tool call's arguments are not an object",
    ),
    "surrogate in arguments": (
        asked(content=None, tool_calls=[{"function": {"name": "f", "arguments": {"x": "\ud800"}}}]),
        "a tool call is not valid Unicode text",
    ),
    "tool call of the user": (
        [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, {"role": "assistant", "content": "b"}],
        "a message that is no answer calls tools",
    ),
    "tool call that the template does not show": (
        asked(content="", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
        "the chat template leaves out tool calls",
    ),
    "answer first": (
        [{"role": "assistant", "content": "b"}, *asked(content="b")],
        "the roles are out of order",
    ),
    "system prompt late": (
        [*asked(content="b"), {"role": "system", "content": "s"}, *asked(content="b")],
        "the roles are out of order",
    ),
    "two answers": ([*asked(content="b"), {"role": "assistant", "content": "c"}], "the roles are out of order"),
    "result of no call": (
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "b"}],
        "the roles are out of order",
    ),
    "weight of a half": (asked(content="b", weight=0.5), "a message's weight is neither 0 nor 1"),
    "weight in words": (asked(content="b", weight="none"), "a message's weight is neither 0 nor 1"),
    "object for a list": ({"role": "user", "content": "a"}, "column 'messages' is an object, not a list of messages"),
    "empty parts": (asked(content=[]), "a message's content is a list, not text"),
    "part without text": (asked(content=[{"type": "text"}]), "a message's content is a list, not text"),
    "number content": (asked(content=3), "a message's content is a number, not text"),
    "null message": ([None, *asked(content="b")], "a message is not an object"),
    "nested conversation": ([asked(content="b")], "a message is not an object"),
    "empty answer": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
        "an assistant message is empty",
    ),
    "surrogate": ([{"role": "user", "content": "\ud800"}], "a message's content is not valid Unicode text"),
    "all muted": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        "every assistant message in the loss has weight 0",
    ),
}


SHAREGPT = {
    "text": ("hello", "column 'conversations' is text, not a list of messages"),
    "OpenAI's keys": ([{"role": "user", "content": "a"}], "a speaker is none of"),
    "own speaker": ([{"from": "bard", "value": "a"}, {"from": "gpt", "value": "b"}], "a speaker is none of"),
    "null value": ([{"from": "human", "value": None}, {"from": "gpt", "value": "b"}], "a message's content is null"),
    "call that is no JSON": (
        [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}],
        "a function_call is not JSON",
    ),
    "no call": ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "[]"}], "a tool call names no"),
    "observation without a call": (
        [{"from": "human", "value": "a"}, {"from": "observation", "value": "r"}, {"from": "gpt", "value": "b"}],
        "the roles are out of order",
    ),
    "no answer": ([{"from": "human", "value": "a"}], "no assistant message"),
}


@pytest.mark.parametrize("kind", SHAREGPT)
def test_a_damaged_sharegpt_row_is_named(write_rows, tokenizer, kind):
    value, reason = SHAREGPT[kind]
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = write_rows([good, {"conversations": value}, good])
    data = prepare_data(DataConfig(path=path, max_rejected=1, eval_fraction=0.0), tokenizer)
    assert [row["origin"].rsplit(":")[-1] for row in data.train] == ["1", "3"]
    (row,) = data.report.sources[0].rejected
    assert (row.line, row.reason[: len(reason)]) == (2, reason)


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[{", "the tools are not JSON"),
        ({"name": "f"}, "the tools are not a list"),
        (["f"], "the tools are not a list"),
    ],
)
def test_damaged_tools_are_named(write_rows, tokenizer, tools, reason):
    good = {"messages": asked(content="b")}
    path = write_rows([good, {**good, "tools": tools}, good])
    data = prepare_data(DataConfig(path=path, max_rejected=1, eval_fraction=0.0), tokenizer)
    assert len(data.train) == 2
    assert data.report.sources[0].rejected[0].reason.startswith(reason)


CSV_LINES = {
    "a field too many": (b"a,b,c", "malformed CSV: wrong number of fields"),
    "a field too few": (b"a", "malformed CSV: wrong number of fields"),
    "text after a quote": (b'"a"x,b', "malformed CSV"),
    "no completion": (b"a,", "column 'completion' is empty"),
    "Latin-1": ("größer,b".encode("latin-1"), "column 'prompt' is not valid Unicode text"),
}


@pytest.mark.parametrize("kind", CSV_LINES)
def test_a_damaged_csv_line_is_named(tmp_path, tokenizer, kind):
    line, reason = CSV_LINES[kind]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\n".join([b"prompt,completion", b"ask,answer", line, b"ask,answer"]))
    data = prepare_data(DataConfig(path=str(path), max_rejected=1, eval_fraction=0.0), tokenizer)
    assert [row["origin"].rsplit(":")[-1] for row in data.train] == ["2", "4"]
    assert [(row.line, row.reason) for row in data.report.sources[0].rejected] == [(3, reason)]


@pytest.mark.parametrize("value", ["", " ", None, 3, ["a"], "\ud800", "a"])
def test_a_damaged_plain_text_is_named(write_rows, tokenizer, value):
    path = write_rows([{"text": "some words"}, {"text": value}, {"text": "more words"}])
    data = prepare_data(DataConfig(path=path, max_rejected=1, eval_fraction=0.0), tokenizer)
    rejected = [] if value == "a" else [2]
    assert [row.line for row in data.report.sources[0].rejected] == rejected
    assert len(data.train) == 3 - len(rejected)


def test_a_key_given_twice_in_an_array_is_named(tmp_path, tokenizer):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + GOOD + b',\n{"prompt": "a", "prompt": "b", "completion": "c"},\n' + GOOD + b"]")
    data = prepare_data(DataConfig(path=str(path), max_rejected=1, eval_fraction=0.0), tokenizer)
    assert [row["origin"].rsplit(":")[-1] for row in data.train] == ["1", "3"]
    assert [(row.line, row.reason) for row in data.report.sources[0].rejected] == [(2, "a key is given twice")]


def test_there_are_sixty_kinds_of_damage_of_a_row():
    assert len(LINES) + len(MESSAGES) + len(SHAREGPT) + len(CSV_LINES) >= 60


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_damaged_conversation_is_named(write_rows, tokenizer, kind):
    value, reason = MESSAGES[kind]
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write_rows([good, {"messages": value}, good])
    data = prepare_data(DataConfig(path=path, max_rejected=1, eval_fraction=0.0), tokenizer)
    assert len(data.train) == 2
    (row,) = data.report.sources[0].rejected
    assert row.line == 2
    assert row.reason.startswith(reason)


FILES = {
    "empty": ("a.jsonl", b"", "there are no rows"),
    "blank lines": ("a.jsonl", b"\n\n \n", "there are no rows"),
    "empty json": ("a.json", b"", "there are no rows"),
    "empty array": ("a.json", b" [ ] ", "there are no rows"),
    "header only": ("a.csv", b"prompt,completion\n", "there are no rows"),
    "nothing readable": ("a.jsonl", b"x\ny\n", "no row can be read"),
    "array cut off": ("a.json", b"[" + GOOD + b",\n{", "malformed JSON"),
    "array without a comma": ("a.json", b"[" + GOOD + GOOD + b"]", "malformed JSON"),
    "text after the array": ("a.json", b"[" + GOOD + b"] x", "Extra data"),
    "deep array": ("a.json", b"[" * 200_000, "nested too deeply"),
    "a number": ("a.json", b" 0", "Expecting an array or an object"),
    "an object cut off": ("a.json", b'{"data": [{"prompt": "a"}', "malformed JSON"),
    "two lists": ("a.json", b'{"train": [{}], "test": [{}]}', "holds 2 lists"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "UTF-16"),
    "not parquet": ("a.parquet", b"PAR1 no", "not a readable parquet file"),
    "unknown ending": ("a.xlsx", b"x", "names no known kind of file"),
    "quote never closed": ("a.csv", b'prompt,completion\na,b\nc,"d\ne,f\n', "never closed"),
    "header twice": ("a.csv", b"prompt,prompt\na,b\n", "names columns twice"),
    "all prompts too long": (
        "a.jsonl",
        b'{"prompt": "' + b"w " * 999 + b'", "completion": "b"}',
        "all loss tokens are cut off",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_one_clear_error(tmp_path, tokenizer, kind):
    name, content, words = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare_data(DataConfig(path=str(path), max_rejected=5, max_length=64), tokenizer)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_row_of_which_only_the_end_is_cut_is_used_and_counted(write_rows, tokenizer):
    path = write_rows([{"prompt": "ask:", "completion": "word " * 100}])
    data = prepare_data(DataConfig(path=path, max_length=32, eval_fraction=0.0), tokenizer)
    row = data.train[0]
    assert len(row["input_ids"]) == len(row["labels"]) == 32
    assert tokenizer.eos_token_id not in row["labels"]
    assert (data.report.train.truncated, data.report.train.longest) == (1, 32)
    assert data.report.train.loss_tokens == sum(label != -100 for label in row["labels"])
    assert "1 cut at 32 tokens" in data.report.lines()[0]
    assert row["answer"] == "word " * 100


def test_the_share_and_the_count_of_allowed_bad_rows(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + b"\n") * 99 + b"bad\n")
    assert len(prepare_data(DataConfig(path=str(path), max_rejected=0.01, eval_fraction=0.0), tokenizer).train) == 99
    with pytest.raises(UserError, match=r"allows 0\.5%"):
        prepare_data(DataConfig(path=str(path), max_rejected=0.005), tokenizer)
    with pytest.raises(UserError, match=r"allows 0\.0%"):
        prepare_data(DataConfig(path=str(path), max_rejected=0), tokenizer)


def test_rejected_rows_are_written_even_when_it_stops(tmp_path, tokenizer):
    path, rejected_path = tmp_path / "rows.jsonl", tmp_path / "rejected.jsonl"
    path.write_bytes(b"\n".join([GOOD, b'{"prompt": "\xff"}', b"bad"]))
    with pytest.raises(UserError):
        prepare_data(DataConfig(path=str(path)), tokenizer, rejected_path=rejected_path)
    assert [json.loads(line)["line"] for line in rejected_path.read_text().splitlines()] == [3, 2]


def test_the_report_says_where_the_first_bad_rows_are():
    report = SourceReport("a", read=9)
    report.rejected = [Rejected("a", line, "odd") for line in (2, 3, 5, 7)] + [Rejected("b", 1, "even")]
    assert report.as_dict()["rejected_at"] == {"odd": "line 2, line 3, line 5, ...", "even": "b:line 1"}
    assert "4 x odd (line 2, line 3, line 5, ...); 1 x even (b:line 1)" in "".join(DataReport(sources=[report]).lines())
