"""Several sets of rows: weights, counts, options of their own, leaks between them; and the files they come from."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pyarrow as pa
import pytest

from qmemtune.config.compose import compose, to_yaml
from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.data.render import form_of_training_rows
from qmemtune.data.sources import read_rows
from qmemtune.errors import UserError

ROWS = [{"prompt": f"ask {i}", "completion": f"answer {i}"} for i in range(3)]


@pytest.fixture
def sets(write_rows) -> dict[str, SourceConfig]:
    asks = [{"prompt": f"ask {i}", "completion": "yes"} for i in range(40)]
    turns = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "no"}]}
        for i in range(20)
    ]
    return {
        "asks": SourceConfig(path=write_rows(asks, "asks.jsonl"), weight=0.5),
        "chats": SourceConfig(path=write_rows(turns, "chats.jsonl"), weight=2.5, system="Be short."),
    }


def test_each_set_is_used_as_often_as_its_weight_says(sets, tokenizer):
    data = prepare_data(DataConfig(sources=sets, eval_fraction=0.0), tokenizer)
    uses = Counter(row["origin"] for row in data.train)
    asks = [count for origin, count in uses.items() if "asks" in origin]
    chats = [count for origin, count in uses.items() if "chats" in origin]
    assert (len(asks), set(asks)) == (20, {1})
    assert (len(chats), sorted(set(chats)), sum(chats)) == (20, [2, 3], 50)
    first, second = data.report.sources
    assert (first.name, first.mixed_rows, first.read) == ("asks", 20, 40)
    assert (second.name, second.mixed_rows, second.form) == ("chats", 50, "messages")
    assert first.mixed_tokens + second.mixed_tokens == data.report.train.tokens == sum(data.train.lengths)
    assert any(line.startswith("chats: 50 rows a pass (weight 2.5") for line in data.report.lines())
    assert {row["group"] for row in data.train} == {"asks", "chats"}
    chat = next(row for row in data.train if row["group"] == "chats")
    assert "Be short." in tokenizer.decode(chat["input_ids"])


def test_the_beginning_of_a_mixture_is_mixed_like_the_whole(sets, tokenizer):
    whole = prepare_data(DataConfig(sources=sets, eval_fraction=0.0), tokenizer).train
    part = prepare_data(DataConfig(sources=sets, eval_fraction=0.0, max_train_rows=21), tokenizer).train
    assert Counter(row["group"] for row in part) == {"asks": 6, "chats": 15}
    again = prepare_data(DataConfig(sources=sets, eval_fraction=0.0), tokenizer).train
    assert [row["origin"] for row in whole] == [row["origin"] for row in again]


def test_no_held_out_rows_are_said(sets, tokenizer):
    told = prepare_data(DataConfig(sources=sets, eval_fraction=0.0), tokenizer).report.warnings
    assert any("holds no row out" in warning for warning in told)
    told = prepare_data(DataConfig(sources=sets, eval_fraction=0.5), tokenizer).report.warnings
    assert not any("can be evaluated" in warning for warning in told)


def test_advice_names_the_options_of_the_set(sets, write_rows, tokenizer):
    glued = [{"prompt": f"what is {i}", "completion": "yes"} for i in range(40)]
    sets["glued"] = SourceConfig(path=write_rows(glued, "glued.jsonl"))
    told = [w for w in prepare_data(DataConfig(sources=sets), tokenizer).report.warnings if "run straight" in w]
    assert ["data.sources.asks.prompt_template=" in w for w in told] == [True, False]
    assert ["what is " in w and "data.sources.glued.prompt_template=" in w for w in told] == [False, True]
    questions = [{"question": "a", "reply": "b"}] * 4
    sets["other"] = SourceConfig(path=write_rows(questions, "other.jsonl"))
    with pytest.raises(UserError) as caught:
        prepare_data(DataConfig(sources=sets), tokenizer)
    assert "data.sources.other.columns='{prompt: question" in caught.value.findings[0].fix
    sets["other"].columns = {"prompt": "queston", "completion": "reply"}
    with pytest.raises(UserError) as caught:
        prepare_data(DataConfig(sources=sets), tokenizer)
    assert caught.value.findings[0].where == "data.sources.other.columns.prompt"


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.5])
def test_a_limit_cuts_all_sets_alike(write_rows, tokenizer, weight):
    counts = {"large": 90, "small": 10}
    sets = {
        name: SourceConfig(
            path=write_rows([{"prompt": f"{name} {i}", "completion": "yes"} for i in range(count)], f"{name}.jsonl"),
            weight=weight if name == "small" else 1.0,
        )
        for name, count in counts.items()
    }
    whole = prepare_data(DataConfig(sources=sets, eval_fraction=0.2), tokenizer)
    part = prepare_data(DataConfig(sources=sets, eval_fraction=0.2, max_train_rows=24, max_eval_rows=10), tokenizer)
    for rows, cut in ((whole.train, part.train), (whole.heldout, part.heldout)):
        share = Counter(row["group"] for row in rows)["small"] / len(rows)
        found = Counter(row["group"] for row in cut)
        assert abs(found["small"] - share * len(cut)) <= 1
    assert (len(part.train), len(part.heldout)) == (24, 10)
    # No row twice while others of its set are left.
    assert max(Counter(row["origin"] for row in part.train).values()) == 1


def test_every_set_gives_held_out_rows_that_no_other_set_trains_on(write_rows, tokenizer):
    rows = [{"prompt": f"ask {i}", "completion": "yes"} for i in range(40)]
    sets = {name: SourceConfig(path=write_rows(rows, f"{name}.jsonl")) for name in ("one", "two")}
    data = prepare_data(DataConfig(sources=sets, eval_fraction=0.25), tokenizer)
    assert Counter(row["group"] for row in data.heldout) == {"one": 10, "two": 10}
    held = {row["instruction"] for row in data.heldout}
    assert not held & {row["instruction"] for row in data.train}
    assert len(data.train) == 2 * (40 - len(held))


def test_generated_rows_bring_their_own_held_out_rows_into_a_mixture(sets, tokenizer):
    sets["words"] = SourceConfig(path="generated:word_lists", weight=0.01)
    data = prepare_data(DataConfig(sources=sets, eval_fraction=0.1), tokenizer)
    assert Counter(row["group"] for row in data.heldout) == {"asks": 4, "chats": 2, "words": 160}
    assert Counter(row["group"] for row in data.train)["words"] == 40


def test_sources_in_a_config(tmp_path, write_rows):
    path = write_rows(ROWS, "a.jsonl")
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        "defaults: [_self_]\nmodel: {path: x/y}\ndata:\n  sources:\n    one:\n"
        f"      path: {path}\n      columns: {{prompt: question}}\n    two: {{path: hub/rows, weight: 3}}\n"
    )
    config = compose(
        [f"recipe={recipe}", "data.sources.two.split=test", "+data.sources.three.path=generated:word_lists"]
    )
    one, two, three = config.config.data.sources.values()
    assert (one.path, one.weight, one.columns) == (path, 1.0, {"prompt": "question"})
    assert (two.path, two.weight, two.split) == ("hub/rows", 3.0, "test")
    assert three.path == "generated:word_lists"
    again = tmp_path / "again.yaml"
    again.write_text("defaults: [_self_]\n" + to_yaml(config.config))
    assert compose([f"recipe={again}"]).config.data == config.config.data
    assert list(compose([f"recipe={recipe}", "~data.sources.two"]).config.data.sources) == ["one"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources.a.pth=x/y"], "did you mean data.sources.a.path"),
        (["data.sources.a.weight=2"], "data.sources.a.path must be given"),
        (["data.sources.a.path=x/y", "data.sources.a.weight=heavy"], "must be a number"),
        (["data.sources.a.path=x/y", "data.sources.a.weight=0"], "must be above 0"),
        (["data.sources.a.path=./none.jsonl"], "does not exist"),
        (["data.sources.a=x/y"], "data.sources.a.path"),
        (["data.sources.a.path=x/y", "data.path=x/z"], "both name training rows"),
    ],
)
def test_mistakes_in_sources_are_named(overrides, words):
    with pytest.raises(UserError) as caught:
        compose(["model.path=x/y", *overrides])
    assert words in str(caught.value)


def test_arrow_gzip_and_globs_give_the_same_rows(tmp_path):
    text = "\n".join(json.dumps(row) for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "c.csv.gz").write_bytes(
        gzip.compress("\n".join(["prompt,completion", *(",".join(row.values()) for row in ROWS)]).encode())
    )
    with pa.ipc.new_file(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "e.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.jsonl.gz", "b.json.gz", "c.csv.gz", "d.arrow", "e.arrow"):
        assert [row.values for row in read_rows(str(tmp_path / name))] == ROWS, name
    found = list(read_rows(str(tmp_path / "*.arrow")))
    assert [row.values for row in found] == ROWS * 2
    assert [row.origin.rsplit("/")[-1] for row in found][2:4] == ["d.arrow:3", "e.arrow:1"]
    with pytest.raises(UserError, match="no file fits the pattern"):
        read_rows(str(tmp_path / "*.parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # Without the time, which would be in the test's name, and another one in each worker.
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 500, mtime=0)[:-20]),
        ("a.jsonl.gz", b"not gzip"),
        ("a.arrow", b"ARROW1 no"),
        ("a.arrow", b""),
        ("a.arrow", b"something"),
    ],
)
def test_damaged_files_of_these_kinds_are_one_error(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        prepare_data(DataConfig(path=str(tmp_path / name)), tokenizer)


def test_streaming_reads_no_more_than_is_needed(monkeypatch, tokenizer):
    import datasets

    asked = []

    def endless():
        for i in range(10_000):
            asked.append(i)
            yield {"prompt": f"ask {i}", "completion": "yes"}

    def load(path, name, *, split, streaming):
        assert (path, streaming) == ("some/rows", True)
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(path="some/rows", streaming=True, max_train_rows=50, eval_fraction=0.1)
    data = prepare_data(config, tokenizer)
    assert (len(data.train), len(data.heldout)) == (50, 6)
    assert len(asked) < 100


def test_the_form_of_a_mixture_is_that_of_its_first_set(write_rows):
    chat = write_rows([{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}])
    sources = {"talk": SourceConfig(path=chat), "plain": SourceConfig(path=write_rows(ROWS, "plain.jsonl"))}
    assert form_of_training_rows(DataConfig(path="???", sources=sources)) == "messages"
