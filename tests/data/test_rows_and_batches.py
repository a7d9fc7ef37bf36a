"""The row container, the collator and the length-grouped order."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from qmemtune.config.data import DataConfig
from qmemtune.data.collate import Collator
from qmemtune.data.prepare import prepare_data
from qmemtune.data.rows import TokenRows
from qmemtune.data.sampler import LengthGroupedSampler


@pytest.fixture
def rows(write_rows, tokenizer) -> TokenRows:
    path = write_rows([{"prompt": f"ask {'x' * i}", "completion": "y" * (7 - i)} for i in range(7)])
    return prepare_data(DataConfig(path=path, eval_fraction=0.0), tokenizer).train


def test_rows_are_a_sequence(rows):
    assert len(rows) == 7
    assert rows[-1] == rows[6] == list(rows)[6]
    assert list(rows[2:4]) == [rows[2], rows[3]]
    assert [row["origin"] for row in rows.select([3, 0])] == [rows[3]["origin"], rows[0]["origin"]]
    assert rows.lengths == [len(row["input_ids"]) for row in rows]
    assert rows.loss_lengths == [sum(label != -100 for label in row["labels"]) for row in rows]
    assert rows.groups == [""] * 7
    with pytest.raises(IndexError):
        rows[7]


def test_a_prompt_longer_than_the_row_keeps_all_its_tokens(write_rows, tokenizer):
    path = write_rows([{"prompt": "word " * 50, "completion": "x"}])
    config = DataConfig(path=path, eval_fraction=0.0, loss_on="all", max_length=16)
    row = prepare_data(config, tokenizer).train[0]
    assert len(row["input_ids"]) == 16
    assert tokenizer.decode(row["prompt_ids"]) == "word " * 50


@pytest.mark.parametrize(("multiple", "width"), [(None, 0), (8, 0), (64, 64)])
def test_batches_are_padded_on_the_right(rows, multiple, width):
    batch = Collator(pad_token_id=3, pad_to_multiple_of=multiple)([rows[0], rows[5]])
    longest = max(len(rows[0]["input_ids"]), len(rows[5]["input_ids"]))
    assert batch["input_ids"].shape[1] == (width or (longest if multiple is None else -(-longest // 8) * 8))
    assert batch["instruction"] == [rows[0]["instruction"], rows[5]["instruction"]]
    for i, row in enumerate([rows[0], rows[5]]):
        length = len(row["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert (batch["input_ids"][i, length:] == 3).all()
        assert (batch["labels"][i, length:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
    assert {batch[key].dtype for key in ("input_ids", "attention_mask", "labels")} == {torch.int64}


LENGTHS = np.random.default_rng(0).integers(1, 1000, 1003).tolist()


def order(epoch: int, seed: int = 0, batch_size: int = 8) -> list[int]:
    sampler = LengthGroupedSampler(LENGTHS, batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    assert len(LengthGroupedSampler(LENGTHS, 8)) == 1003
    assert sorted(order(0)) == list(range(1003))
    assert order(0) != order(1) != order(2)
    assert order(0) != order(0, seed=1)


def test_the_order_knows_nothing_of_the_global_random_state():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = (torch.get_rng_state().tolist(), random.getstate())
    first = order(3)
    assert (torch.get_rng_state().tolist(), random.getstate()) == before
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert order(3) == first


def test_batches_hold_rows_of_like_length_and_only_the_last_is_short():
    indices = order(5)
    batches = [indices[i : i + 8] for i in range(0, len(indices), 8)]
    spread = np.mean([np.ptp([LENGTHS[i] for i in batch]) for batch in batches[:-1]])
    assert spread < 60
    means = [np.mean([LENGTHS[i] for i in batch]) for batch in batches]
    assert means != sorted(means)
    assert len(batches[-1]) == 1003 % 8


@pytest.mark.parametrize("count", [40, 96, 240])
def test_few_rows_have_little_padding_and_other_companions_in_every_epoch(count):
    lengths = np.random.default_rng(1).lognormal(5, 0.4, count).astype(int)
    sampler = LengthGroupedSampler(lengths, 8)
    padding, companions = [], []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        batches = np.array(list(sampler)).reshape(-1, 8)
        padding.append(1 - lengths.sum() / (lengths[batches].max(axis=1) * 8).sum())
        companions.append({frozenset((a, b)) for batch in batches for a in batch for b in batch if a != b})
    at_random = np.random.default_rng(2).permutation(count).reshape(-1, 8)
    assert np.mean(padding) < 0.55 * (1 - lengths.sum() / (lengths[at_random].max(axis=1) * 8).sum())
    kept = np.mean([len(a & b) / len(a) for a, b in itertools.pairwise(companions)])
    assert kept < 0.7, "the same batches in every epoch"


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, [1, 10, 11, 7, 14, 6, 18, 16, 17, 12, 0, 8, 9, 5, 15, 3, 4, 2, 19, 13]),
        (3, [18, 8, 13, 7, 10, 14, 11, 15, 5, 0, 3, 4, 9, 17, 16, 2, 19, 1, 6, 12]),
    ],
)
def test_the_first_order_is_still_to_be_had(epoch, expected):
    # Written down when there was no other.
    sampler = LengthGroupedSampler([5, 9, 1, 7, 3, 8, 2, 6, 4, 10] * 2, 2, seed=1, order=1)
    sampler.set_epoch(epoch)
    assert list(sampler) == expected


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (1, 4), (4, 4), (5, 4), (3, 1)])
def test_small_sets(count, batch_size):
    assert sorted(LengthGroupedSampler([5] * count, batch_size, seed=-1)) == list(range(count))


def test_a_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        LengthGroupedSampler([1], 0)
