"""Attention in training on a CPU: the fused kernel's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qmemtune.models import attention, row_attention, short_attention
from qmemtune.models.attention import training_attention


def model(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def padded(side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((10, 6, 3)):
        empty = slice(length, None) if side == "right" else slice(0, 10 - length)
        mask[row, empty], ids[row, empty] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each call of the short kernel."""
    seen: list[int] = []
    real: Callable[..., torch.Tensor] = attention.short_attention

    def counted(*args: object) -> torch.Tensor:
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(attention, "short_attention", counted)
    return seen


@pytest.mark.parametrize(("dtype", "exactly"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_the_numbers_and_gradients_of_the_fused_kernel(
    calls: list[int], side: str, dtype: torch.dtype, exactly: torch.dtype
) -> None:
    batch = padded("right" if side == "none" else side)
    if side == "none":
        del batch["attention_mask"]
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    exact = model(exactly)

    def run(lm: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        logits = lm(**batch, use_cache=False).logits.to(exactly)[real]
        logits.log_softmax(-1)[:, 5].mean().backward()
        gradient = torch.cat([p.grad.to(exactly).flatten() for p in lm.parameters() if p.grad is not None])
        return logits.detach(), gradient

    expected, fused = run(exact), run(model(dtype))
    with training_attention():
        short = run(model(dtype))
    assert len(calls) == 2
    for ours, theirs, right in zip(short, fused, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - right).norm() <= 1.5 * (theirs - right).norm()


@pytest.mark.parametrize("lengths", [[40], [33, 16, 17]])
def test_rows_beyond_the_limit_have_the_fused_kernel_s_numbers_and_gradients(
    calls: list[int], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
    monkeypatch.setattr(short_attention, "MOST_BYTES", 0)
    # Several blocks, the last of them not whole.
    monkeypatch.setattr(row_attention, "SMALLEST", 16)
    monkeypatch.setattr(row_attention, "AT_ONCE", 64)
    backward = Mock(wraps=row_attention._back)
    monkeypatch.setattr(row_attention, "_back", backward)
    ids = torch.randint(1, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(tokens) for tokens in lengths])[None]
    inputs = {"input_ids": ids, "position_ids": positions}

    def run(lm: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        with attention.rows_of(lengths):
            logits = lm(**inputs, use_cache=False).logits.float()
        logits.log_softmax(-1)[..., 5].mean().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in lm.parameters() if p.grad is not None])
        return logits.detach(), gradient

    # Without it transformers' mask keeps rows apart by their positions.
    (_, exact), (numbers, fused) = run(model(torch.float32)), run(model())
    with training_attention():
        ours_numbers, ours = run(model())
    assert not calls
    assert backward.call_count == 2 * len(lengths)
    torch.testing.assert_close(ours_numbers, numbers, rtol=0.02, atol=0.02)
    assert (ours - exact).norm() <= 1.5 * (fused - exact).norm()


@pytest.mark.parametrize("other", ["float32", "longest", "window"])
def test_rows_beyond_the_limit_are_the_fused_kernel_s_where_it_is_no_slower(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_attention, "MOST_BYTES", 0)
    kernel = Mock(wraps=attention.row_attention)
    monkeypatch.setattr(attention, "row_attention", kernel)
    lm = model(torch.float32 if other == "float32" else torch.bfloat16)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril().triu(-4) if other == "window" else None
    with training_attention():
        inputs = {"input_ids": torch.arange(1, 21)[None], "use_cache": False}
        if other == "longest":
            lm(**inputs)
            assert kernel.call_count == 2
            kernel.reset_mock()
            monkeypatch.setattr(row_attention, "LONGEST", 19)
        lm(**inputs, attention_mask=mask)
    assert not kernel.called


def test_it_stands_aside_where_it_is_not_meant(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = padded("right")
    with training_attention():
        with torch.no_grad():
            model()(**batch)
        model(torch.float16)(**batch)
        with monkeypatch.context() as changed:
            changed.setattr(short_attention, "MOST_BYTES", 100)
            model()(**batch)
        assert not calls
        model()(**batch)
        assert calls
    calls.clear()
    with training_attention(written_out=False):
        model()(**batch)
    model()(**batch)
    assert not calls


def test_as_many_long_rows_of_a_sequence_keep_their_weights_as_fit(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
    ids = torch.arange(1, 25)[None]
    positions = torch.cat([torch.arange(12), torch.arange(12)])[None]
    # Two layers; 4 heads, two rows of 12 tokens, 2 bytes.
    row = 4 * 12 * 12 * 2
    for limit, expected in ((2 * row, 4), (2 * row - 1, 2), (row, 2), (row - 1, 0)):
        monkeypatch.setattr(short_attention, "MOST_BYTES", limit)
        with training_attention(), attention.rows_of([12, 12]):
            model()(input_ids=ids, position_ids=positions, use_cache=False)
        assert len(calls) == expected
        calls.clear()


def test_transformers_has_its_own_attention_back_after_an_error() -> None:
    def registered() -> list[object]:
        return [functions["sdpa"] for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]

    def fail() -> None:
        with training_attention():
            inside.extend(registered())
            raise ZeroDivisionError

    before, inside = registered(), list[object]()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not set(map(id, inside)) & set(map(id, before))
    assert registered() == before
