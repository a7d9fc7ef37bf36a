"""The cache of tokenised rows: the same rows, and nothing stale whatever changes."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from qmemtune.config.data import DataConfig, SourceConfig
from qmemtune.data import prepare
from qmemtune.data.cache import KEPT_S, cache_entry
from qmemtune.data.prepare import prepare_data, prepare_heldout


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QMEMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def config(write_rows) -> DataConfig:
    rows = [{"prompt": f"ask {i}", "completion": f"answer {i}"} for i in range(30)]
    return DataConfig(path=write_rows([*rows, {"prompt": "\ud800", "completion": "x"}]), max_rejected=1)


def test_a_second_time_gives_the_same_rows_and_report_without_tokenising(config, tokenizer, monkeypatch, tmp_path):
    first = prepare_data(config, tokenizer)
    assert first.report.cached_in == ""
    monkeypatch.setattr(prepare, "Preparation", None)
    again = prepare_data(config, tokenizer, rejected_path=tmp_path / "rejected.jsonl")
    assert list(again.train) == list(first.train)
    assert list(again.heldout) == list(first.heldout)
    assert again.train.lengths == first.train.lengths
    assert again.heldout.loss_lengths == first.heldout.loss_lengths
    assert {**again.report.as_dict(), "cached": False} == first.report.as_dict()
    assert any("come from the cache" in line for line in again.report.lines())
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["line"] == 31
    alone = prepare_heldout(config, tokenizer)
    assert list(alone.heldout) == list(first.heldout)
    assert len(alone.train) == 0


def test_a_mixture_comes_back_as_mixed(config, tokenizer):
    sources = {"a": SourceConfig(path=config.path, weight=2.0), "b": SourceConfig(path=config.path, weight=0.5)}
    mixture = replace(config, path="???", sources=sources)
    first, again = prepare_data(mixture, tokenizer), prepare_data(mixture, tokenizer)
    assert again.report.cached_in
    assert list(again.train) == list(first.train)
    assert again.report.as_dict()["sources"] == first.report.as_dict()["sources"]


def test_a_split_that_a_mixture_does_not_use_is_not_looked_for(tmp_path, write_rows, tokenizer, own_cache):
    (tmp_path / "set").mkdir()
    write_rows([{"prompt": f"ask {i}", "completion": "x"} for i in range(9)], "set/train.jsonl")
    mixture = DataConfig(sources={"a": SourceConfig(path=str(tmp_path / "set"))}, eval_split="test")
    rows = list(prepare_data(mixture, tokenizer).train)
    assert rows == list(prepare_data(replace(mixture, cache=False), tokenizer).train)
    assert len(list(own_cache.iterdir())) == 1


def test_whatever_decides_the_rows_decides_the_entry(config, tokenizer, chat_tokenizer, bos_tokenizer, write_rows):
    def name(config=config, tokenizer=tokenizer) -> str:
        entry = cache_entry(config, tokenizer)
        assert entry is not None
        return entry.path.name

    names = [
        name(),
        name(tokenizer=bos_tokenizer),
        name(tokenizer=chat_tokenizer("{{ messages }}")),
        name(replace(config, max_length=99)),
        name(replace(config, loss_on="all")),
        name(replace(config, prompt_template="{prompt} ")),
        name(replace(config, split_seed=1)),
        name(replace(config, system="s")),
        name(replace(config, max_train_rows=3)),
        name(replace(config, eval_path=config.path)),
    ]
    before = name()
    path = Path(config.path)
    stat = path.stat()
    path.write_text(path.read_text().replace("answer 7", "answer 8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    names.append(name())
    assert len(set(names)) == len(names)
    path.write_text(path.read_text().replace("answer 8", "answer 7", 1))
    assert name() == before


def test_a_changed_file_is_never_served_from_before(config, tokenizer):
    prepare_data(config, tokenizer)
    path = Path(config.path)
    path.write_text(path.read_text().replace("answer", "reply"))
    data = prepare_data(config, tokenizer)
    assert not data.report.cached_in
    assert all(row["answer"].startswith("reply") for row in data.train)


def test_off_means_off(config, tokenizer, own_cache):
    prepare_data(replace(config, cache=False), tokenizer)
    assert not own_cache.exists()


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0", b"cut"])
def test_a_damaged_entry_is_made_again(config, tokenizer, own_cache, damage):
    first = prepare_data(config, tokenizer)
    (entry,) = own_cache.glob("*.arrow")
    entry.write_bytes(damage if damage != b"cut" else entry.read_bytes()[:-300])
    again = prepare_data(config, tokenizer)
    assert not again.report.cached_in
    assert list(again.train) == list(first.train)
    assert prepare_data(config, tokenizer).report.cached_in


def test_several_at_once_leave_one_whole_entry(config, tokenizer, own_cache):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: list(prepare_data(config, tokenizer).train), range(8)))
    assert all(result == results[0] for result in results)
    assert [file.suffix for file in own_cache.iterdir()] == [".arrow"]


def test_what_is_not_used_is_removed(config, tokenizer, own_cache):
    prepare_data(config, tokenizer)
    (old,) = own_cache.iterdir()
    long_ago = time.time() - KEPT_S - 60
    os.utime(old, (long_ago, long_ago))
    prepare_data(replace(config, max_length=99), tokenizer)
    assert not old.exists()
    assert len(list(own_cache.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_error(config, tokenizer, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QMEMTUNE_CACHE", str(tmp_path / "file"))
    assert len(prepare_data(config, tokenizer).train) > 0
