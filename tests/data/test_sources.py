"""Kinds of sources: the same rows from every kind of file, folder and hub, each with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from qmemtune.config.data import DataConfig
from qmemtune.data import generated
from qmemtune.data.prepare import prepare_data
from qmemtune.data.records import RawRow, Rejected
from qmemtune.data.sources import read_rows
from qmemtune.errors import UserError

ROWS = [{"prompt": f'ask, "{i}"\nagain', "completion": f"größe {i}; ok"} for i in range(3)]


def as_jsonl(path):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


def as_jsonl_crlf_bom(path):
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")


def as_array(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def as_object(path):
    path.write_text(json.dumps({"version": "1 [", "data": ROWS, "n": 3}), encoding="utf-8")


def as_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


def as_semicolon_csv_bom(path):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=";")
        writer.writeheader()
        writer.writerows(ROWS)


def as_tsv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t")
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path):
    parquet.write_table(pa.Table.from_pylist(ROWS), path)


KINDS = {
    "jsonl": (as_jsonl, "rows.jsonl", [1, 2, 3]),
    "bom and crlf": (as_jsonl_crlf_bom, "rows.jsonl", [1, 2, 3]),
    "lines named json": (as_jsonl, "rows.json", [1, 2, 3]),
    "array": (as_array, "rows.json", [2, 6, 10]),
    "object": (as_object, "rows.json", [1, 1, 1]),
    "csv": (as_csv, "rows.csv", [2, 4, 6]),
    "semicolons": (as_semicolon_csv_bom, "rows.csv", [2, 4, 6]),
    "tsv": (as_tsv, "rows.tsv", [2, 4, 6]),
    "parquet": (as_parquet, "rows.parquet", [1, 2, 3]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    write, name, lines = KINDS[kind]
    path = tmp_path / name
    write(path)
    rows = list(read_rows(str(path)))
    assert [row.values for row in rows] == ROWS
    assert [row.line for row in rows] == lines
    assert rows[0].origin == f"{path}:{lines[0]}"


def test_one_conversation_as_a_json_document_is_one_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert len(list(read_rows(str(path)))) == 1


def test_elements_that_are_no_objects_are_rejected_with_their_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "a"},\n 5,\n\n{"prompt": "b"}\n]')
    kinds = [(type(row), row.line) for row in read_rows(str(path))]
    assert kinds == [(RawRow, 2), (Rejected, 3), (RawRow, 5)]


def test_csv_rows_with_other_numbers_of_fields_or_stray_quotes_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\na,b\n\na,b,c\n"a"x,b\nonly\nc,\xff\nd,e\n')
    rows = list(read_rows(str(path)))
    assert [(type(row), row.line) for row in rows] == [
        (RawRow, 2),
        (Rejected, 4),
        (Rejected, 5),
        (Rejected, 6),
        (RawRow, 7),
        (RawRow, 8),
    ]


@pytest.mark.parametrize("held", ["testdata", "validset", "evalset"])
def test_a_split_in_other_words_is_asked_about(tmp_path, held):
    """Rather than trained on."""
    for name in ("traindata", held):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="no file of the folder is named after the split 'train'"):
        list(read_rows(str(tmp_path)))


def test_a_csv_may_be_named_after_a_tsv(tmp_path):
    path = tmp_path / "rows.tsv.csv"
    path.write_text("prompt,completion\na,b\n")
    assert [row.values for row in read_rows(str(path))] == [{"prompt": "a", "completion": "b"}]


def test_a_tsv_with_one_column_may_hold_commas(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("text\nHello, world\nSemi; colon\n")
    assert [row.values for row in read_rows(str(path))] == [{"text": "Hello, world"}, {"text": "Semi; colon"}]


def test_a_csv_header_that_cannot_be_read_is_an_error_of_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"prompt" ,"completion"\nhello,world\n')
    with pytest.raises(UserError, match="the header cannot be read"):
        list(read_rows(str(path)))


def test_a_number_of_hundreds_of_digits_rejects_its_row(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        f'{{"prompt": "a", "completion": {"9" * 400}}}\n{"9" * 400}\n{{"prompt": "a", "completion": "b"}}\n'
    )
    data = prepare_data(DataConfig(path=str(path), eval_fraction=0.0, max_rejected=2), tokenizer)
    assert [row.line for row in data.report.sources[0].rejected] == [2, 1]
    assert len(data.train) == 1


def test_a_csv_field_may_be_long_and_the_limit_is_left_as_it_was(tmp_path):
    limit = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na," + "b" * 200_000 + "\n")
    (row,) = read_rows(str(path))
    assert len(row.values["completion"]) == 200_000
    assert csv.field_size_limit() == limit


def test_parquet_text_that_is_not_unicode_is_rejected_alone(tmp_path):
    path = tmp_path / "rows.parquet"
    bad = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"prompt": bad}), path)
    assert [(type(row), row.line) for row in read_rows(str(path))] == [(RawRow, 1), (Rejected, 2), (RawRow, 3)]


def test_conversations_in_parquet(tmp_path, tokenizer, in_loss):
    path = tmp_path / "chat.parquet"
    turns = [{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1}]
    parquet.write_table(pa.Table.from_pylist([{"messages": turns}]), path)
    data = prepare_data(DataConfig(path=str(path), eval_fraction=0.0), tokenizer)
    assert in_loss(data.train[0]) == "b<|im_end|>"


def test_folders(tmp_path):
    import datasets

    (tmp_path / "files").mkdir()
    as_jsonl(tmp_path / "files" / "train-00001.jsonl")
    as_csv(tmp_path / "files" / "test.csv")
    assert [row.values for row in read_rows(str(tmp_path / "files"))] == ROWS
    assert [row.line for row in read_rows(str(tmp_path / "files"), split="test")] == [2, 4, 6]
    with pytest.raises(UserError, match="named after the split 'validation'"):
        read_rows(str(tmp_path / "files"), split="validation")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "splits")
    assert [row.values for row in read_rows(str(tmp_path / "saved"))] == ROWS
    assert [row.values for row in read_rows(str(tmp_path / "splits"))] == ROWS
    with pytest.raises(UserError, match="no split 'dev'"):
        read_rows(str(tmp_path / "splits"), split="dev")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no data file"):
        read_rows(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("files", "split", "read"),
    [
        (["latest.jsonl", "part-1.jsonl"], "train", ["latest.jsonl", "part-1.jsonl"]),
        (["training.jsonl"], "train", ["training.jsonl"]),
        (["train.jsonl", "training-more.jsonl"], "train", ["train.jsonl"]),
        (["gsm8k_train1.jsonl", "gsm8k_dev.jsonl"], "validation", ["gsm8k_dev.jsonl"]),
        (["train_sft.jsonl", "train_gen.jsonl"], "train_sft", ["train_sft.jsonl"]),
        (["latest.jsonl", "training.jsonl"], "test", None),
        (["rows.jsonl", "val.jsonl"], "train", None),
    ],
)
def test_files_of_a_split_are_told_by_whole_words(tmp_path, files, split, read):
    for file in files:
        as_jsonl(tmp_path / file)
    if read is None:
        with pytest.raises(UserError, match="named after the split"):
            read_rows(str(tmp_path), split=split)
    else:
        assert sorted({Path(row.file).name for row in read_rows(str(tmp_path), split=split)}) == read


def test_held_out_rows_of_a_folder_are_those_of_the_split(tmp_path, write_rows, tokenizer):
    write_rows([{"prompt": "a", "completion": "x"}], "train.jsonl")
    write_rows([{"prompt": "b", "completion": "x"}], "test.jsonl")
    data = prepare_data(DataConfig(path=str(tmp_path), eval_split="test"), tokenizer)
    assert [row["instruction"] for row in (*data.train, *data.heldout)] == ["a", "b"]


@pytest.mark.parametrize("kind", ["pattern", "folder", "saved"])
def test_rows_without_splits_give_no_held_out_split(tmp_path, tokenizer, kind):
    import datasets

    as_jsonl(tmp_path / "latest.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    path = {"pattern": tmp_path / "*.jsonl", "folder": tmp_path, "saved": tmp_path / "saved"}[kind]
    with pytest.raises(UserError, match="=test names no rows") as caught:
        prepare_data(DataConfig(path=str(path), eval_split="test"), tokenizer)
    assert "data.eval_path" in str(caught.value.findings[0].fix)


def test_a_misspelt_file_is_told_from_a_hub_id(tmp_path):
    as_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"did you mean .*rows\.jsonl"):
        read_rows(str(tmp_path / "row.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_rows("nowhere/rows.json")
    with pytest.raises(UserError, match="no such file"):
        read_rows("three/part/name")


@pytest.mark.parametrize("path", ["nobody/nothing", "nothing"])
def test_a_hub_data_set_that_cannot_be_had_is_an_error_with_a_way_out(path):
    with pytest.raises(UserError, match="hub data set cannot be loaded") as caught:
        read_rows(path, name="main")
    assert "local file" in str(caught.value)


def test_generated_rows_come_with_their_held_out_rows(monkeypatch, tokenizer):
    train = [{"instruction": "Up", "prompt": f"Up: {i}", "completion": f"{i + 1}", "family": "up"} for i in range(6)]
    monkeypatch.setitem(generated.GENERATED, "toy", lambda: (train[:4], train[4:]))
    data = prepare_data(DataConfig(path="generated:toy", group_by="family"), tokenizer)
    assert [row["answer"] for row in data.train] == ["1", "2", "3", "4"]
    assert [row["answer"] for row in data.heldout] == ["5", "6"]
    assert {row["group"] for row in data.heldout} == {"up"}
    with pytest.raises(UserError, match="did you mean generated:toy"):
        prepare_data(DataConfig(path="generated:toi"), tokenizer)
