"""Damaged input: every kind is named, with its line, and the good rows around it are used."""

from __future__ import annotations

import json

import pytest

from qmemtune.config.schema import DataConfig
from qmemtune.data.prepare import prepare_data
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
    "tool call": ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tool calls are not supported"),
    "empty answer": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
        "an assistant message is empty",
    ),
    "surrogate": ([{"role": "user", "content": "\ud800"}], "a message's content is not valid Unicode text"),
    "all muted": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        "every assistant message has weight 0",
    ),
}


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
