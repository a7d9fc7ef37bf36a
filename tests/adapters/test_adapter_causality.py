"""A route never looks at later tokens, at other rows or at padding; cached decoding gives the full forward's logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-5
OPTIONS = [{}, {"top_k": 2}, {"block_size": 1}, {"center_queries": False}]


@pytest.fixture(params=OPTIONS, ids=["all-atoms", "top-2", "a-block-a-layer", "not-centred"])
def model(request, family):
    return family.adapted(**request.param)


def decided(family, model, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Rows whose routes are not within rounding of another choice of atoms, (B,)."""
    config = family.memory(model).configs["default"]
    keep = torch.ones(ids.shape[0], dtype=torch.bool)
    if config.top_k is None:
        return keep
    # The margin at the cut is that of the logits; with top_k off, ratios of weights are their differences.
    kept, config.top_k = config.top_k, None
    try:
        for route in family.routes(model, ids, **inputs).values():
            ranked = route.log().sort(dim=-1, descending=True).values
            keep &= (ranked[..., kept - 1] - ranked[..., kept] > 1e-4).all(dim=-1)
    finally:
        config.top_k = kept
    return keep


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_later_token_changes_nothing_before_it(family, model):
    ids = family.tokens(6, 12)
    before = family.logits(model, ids)
    for position in (1, 6, 11):
        changed = ids.clone()
        changed[:, position] = (ids[:, position] - 3 + 17) % 61 + 3
        after = family.logits(model, changed)
        close(after[:, :position], before[:, :position])
        assert (after[:, position:] - before[:, position:]).abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_equals_itself_in_a_padded_batch(family, model, side):
    lengths = [12, 7, 3, 9]
    ids, mask = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long)
    rows = [family.tokens(1, length, seed=length) for length in lengths]
    places = []
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[index, place], mask[index, place] = row[0], 1
        places.append(place)
    positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    batch = family.logits(model, ids, attention_mask=mask, position_ids=positions)
    compared = 0
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        if decided(family, model, row).all():
            close(batch[index, place], family.logits(model, row)[0])
            compared += 1
    assert compared >= 2


def test_cached_decoding_equals_the_full_forward(family, model):
    ids = family.tokens(6, 12)
    full = family.logits(model, ids)
    rows = decided(family, model, ids)
    assert rows.sum() >= 2
    for prefill in (1, 7):
        with torch.no_grad():
            out = model(input_ids=ids[:, :prefill], use_cache=True)
            steps = [out.logits]
            for position in range(prefill, ids.shape[1]):
                out = model(
                    input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True
                )
                steps.append(out.logits)
        close(torch.cat(steps, dim=1)[rows], full[rows])


def test_generate_equals_greedy_full_forwards(family, model):
    prompt = family.tokens(3, 5)
    done = model.generate(input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids = prompt
    for _ in range(6):
        logits = family.logits(model, ids)[:, -1]
        logits[:, 2] = float("-inf")
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(done, ids)


def test_generate_of_a_left_padded_batch_equals_each_row_alone(llama):
    model = llama.adapted()
    short, long = llama.tokens(1, 4, seed=4), llama.tokens(1, 8, seed=8)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    both = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(both[0, 4:], model.generate(input_ids=short, **options)[0])
    assert torch.equal(both[1], model.generate(input_ids=long, **options)[0])
