"""Packs: every row once, none too long, little left over; and their batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmemtune.config.data import DataConfig
from qmemtune.data.packing import PackCollator, PackedRows, pack
from qmemtune.data.prepare import prepare_data


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=40), size=st.integers(1, 64))
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(lengths, size):
    packs = pack(lengths, size)
    assert sorted(i for found in packs for i in found) == list(range(len(lengths)))
    for found in packs:
        assert sum(lengths[i] for i in found) <= size or len(found) == 1
    # No two packs could have been one.
    totals = sorted(sum(lengths[i] for i in found) for found in packs)
    assert len(totals) < 2 or totals[0] + totals[1] > size


def test_packs_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 400, 2000).tolist()
    packs = pack(lengths, 1024)
    assert sum(lengths) / (len(packs) * 1024) > 0.98


@pytest.fixture
def packed(write_rows, tokenizer) -> PackedRows:
    path = write_rows([{"prompt": f"ask {'x' * i}", "completion": "y" * (9 - i)} for i in range(9)])
    return PackedRows(prepare_data(DataConfig(path=path, eval_fraction=0.0), tokenizer).train, 40)


def test_a_pack_is_its_rows_one_after_the_other(packed):
    assert 1 < len(packed) < 9
    for found, lengths, i in zip(packed, packed.lengths, range(len(packed)), strict=True):
        rows = [packed.rows[row] for row in packed.packs[i]]
        assert found["input_ids"] == [token for row in rows for token in row["input_ids"]]
        assert found["labels"] == [label for row in rows for label in row["labels"]]
        assert found["position_ids"] == [p for row in rows for p in range(len(row["input_ids"]))]
        assert lengths == len(found["input_ids"])
        starts = [k for k, position in enumerate(found["position_ids"]) if position == 0]
        assert all(found["labels"][start] == -100 for start in starts)


def test_padding_is_a_row_of_its_own(packed):
    first, last = packed[0], packed[len(packed) - 1]
    batch = PackCollator(3)([first, last])
    length = len(last["input_ids"])
    rest = batch["input_ids"].shape[1] - length
    assert batch["position_ids"][1, length:].tolist() == list(range(rest))
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(first["input_ids"]), length]
    assert (batch["labels"][1, length:] == -100).all()
    rows = batch["instruction_row"]
    assert batch["instruction"] == [*first["instruction"], *last["instruction"], ""]
    assert (rows[1, length:] == len(batch["instruction"]) - 1).all(), "padding has no instruction"
    assert rows[0, 0] == 0
    assert rows[1, 0] == len(first["instruction"])
    assert rows[1, length - 1] == len(batch["instruction"]) - 2
