"""Random rows and files: an answer or a UserError, never another exception, and what is used is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qmemtune.config.data import DataConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.errors import UserError

SMALL = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
FRAGMENTS = st.sampled_from(
    ["<|im_end|>", "<|im_", "end|>", "<|", "\n", " ", "{", "é", "\ue000", "\u2028", "ok", "\x00"]
)
TEXTS = st.lists(FRAGMENTS, min_size=1, max_size=8).map("".join)
KEYS = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight", "x"]
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | TEXTS | ROLES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ["prompt", "completion", "instruction", "input", "output", "messages", "conversations", "text", "tools"]


@SMALL
@given(prompt=TEXTS, completion=TEXTS)
def test_texts_come_back_exactly_and_hold_no_control_token(tmp_path, tokenizer, prompt, completion):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": f"a{prompt}", "completion": f"b{completion}"}), encoding="utf-8")
    row = prepare_data(DataConfig(path=str(path), eval_fraction=0.0), tokenizer).train[0]
    length = len(row["prompt_ids"])
    assert tokenizer.decode(row["prompt_ids"]) == f"a{prompt}"
    assert tokenizer.decode(row["labels"][length:-1]) == f"b{completion}"
    assert not set(tokenizer.added_tokens_decoder) & set(row["input_ids"][:-1])


@SMALL
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_conversations_come_back_exactly_with_as_many_turns_as_they_have(tmp_path, tokenizer, turns):
    messages = [
        {"role": role, "content": f"x{text}"}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    row = prepare_data(DataConfig(path=str(path), eval_fraction=0.0), tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)[:-1]
    assert row["input_ids"].count(tokenizer.eos_token_id) == len(messages)
    assert row["labels"].count(tokenizer.eos_token_id) == len(turns)


@SMALL
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES), min_size=1, max_size=4))
@example(rows=[{"prompt": ["\x85\u2028\u2029"]}, {"text": "0"}])
def test_rows_of_any_kind_are_used_or_rejected(tmp_path, tokenizer, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expect_rows_or_user_error(path, tokenizer, len(rows))


MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": VALUES}, optional={"tool_calls": VALUES, "weight": VALUES})
TURN = st.fixed_dictionaries({"from": ROLES, "value": VALUES}, optional={"weight": VALUES})


@SMALL
@given(talk=st.lists(MESSAGE, max_size=5), other=st.lists(TURN, max_size=5), first=st.booleans())
def test_conversations_of_any_kind_are_used_or_rejected(tmp_path, tokenizer, talk, other, first):
    rows = [{"messages": talk}] if first else [{"conversations": other}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expect_rows_or_user_error(path, tokenizer, len(rows))


@SMALL
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@given(content=st.binary(max_size=60) | st.text("[]{},:\"\\ \n'abprompt0", max_size=60).map(str.encode))
def test_files_of_any_bytes_are_read_or_refused(tmp_path, tokenizer, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    expect_rows_or_user_error(path, tokenizer, None)


def expect_rows_or_user_error(path: Path, tokenizer, count: int | None) -> None:
    config = DataConfig(path=str(path), eval_fraction=0.0, max_rejected=100)
    rejected_path = path.with_name("rejected.jsonl")
    try:
        data = prepare_data(config, tokenizer, rejected_path=rejected_path)
    except UserError:
        return
    (source,) = data.report.sources
    assert source.read == len(data.train) - data.report.train.continued + len(source.rejected)
    assert count is None or source.read == count
    assert all(any(label != -100 for label in row["labels"]) for row in data.train)
    if source.rejected:
        records = [json.loads(line) for line in rejected_path.read_text(encoding="utf-8").splitlines()]
        assert len(records) == len(source.rejected)
