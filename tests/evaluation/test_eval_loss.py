"""Row losses equal the model's own loss, whatever the batch and whatever follows the head."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qmemtune.data.collate import Collator
from qmemtune.evaluation import labelled
from qmemtune.evaluation.loss import label_logprobs, row_losses
from qmemtune.models import head


def own_losses(model, rows):
    """Each row by itself, through the model's own loss."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            tokens = int((labels[:, 1:] != -100).sum())
            found.append((float(model(input_ids=ids, labels=labels).loss) * tokens, tokens))
    return found


def losses(model, rows, **options):
    return row_losses(model, rows, **{"pad_token_id": 3, "batch_size": 4} | options)


def test_losses_are_the_models_own(model, rows):
    found = losses(model, rows)
    assert [row.group for row in found] == [row["group"] for row in rows]
    for ours, (loss, tokens) in zip(found, own_losses(model, rows), strict=True):
        assert ours.tokens == tokens
        assert ours.loss_sum == pytest.approx(loss, rel=1e-5, abs=1e-5)


def test_order_and_batch_size_do_not_matter(llama, rows):
    expected = losses(llama, rows)
    for found in (
        losses(llama, rows, batch_size=1),
        losses(llama, rows, batch_size=100),
        losses(llama, rows, pad_token_id=7),
        losses(llama, rows[::-1])[::-1],
    ):
        assert [row.tokens for row in found] == [row.tokens for row in expected]
        assert [row.loss_sum for row in found] == pytest.approx([row.loss_sum for row in expected], rel=1e-5)


def test_small_chunks_change_nothing(model, rows, monkeypatch):
    expected = [row.loss_sum for row in losses(model, rows)]
    monkeypatch.setattr(labelled, "CHUNK_ELEMENTS", 1500)
    assert [row.loss_sum for row in losses(model, rows)] == pytest.approx(expected, rel=1e-5)


def test_the_head_sees_labelled_positions_only(llama, rows):
    seen = []
    handle = llama.lm_head.register_forward_hook(lambda head, args, output: seen.append(output.shape[:-1].numel()))
    found = losses(llama, rows, batch_size=100)
    handle.remove()
    # The probe and its check take two positions each.
    assert sum(seen) == sum(row.tokens for row in found) + 4


def test_soft_capping_is_noticed(gemma2, rows, monkeypatch):
    reader = labelled.LabelReader(gemma2)
    batch = Collator(0)(rows)
    found = torch.cat([chunk for _, chunk in reader.read(batch).chunks()])
    with torch.no_grad():
        own = gemma2(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, own[:, :-1][batch["labels"][:, 1:] != -100], rtol=1e-5, atol=1e-6)
    assert reader._mode == "head"
    # Had the configuration not told of it, the model itself would do what comes after its head.
    monkeypatch.setattr(head, "transform_candidates", lambda lm: [lambda logits: logits])
    reader = labelled.LabelReader(gemma2)
    again = torch.cat([chunk for _, chunk in reader.read(batch).chunks()])
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)
    assert reader._mode == "labelled positions"


def test_an_adapted_head_is_run_in_its_rows(llama, rows):
    model = get_peft_model(llama, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)).eval()
    for ours, (loss, _) in zip(losses(model, rows), own_losses(model, rows), strict=True):
        assert ours.loss_sum == pytest.approx(loss, rel=1e-5)


def test_a_row_without_labels_counts_nothing(llama, rows):
    bare = rows[0] | {"labels": [-100] * len(rows[0]["input_ids"])}
    found = losses(llama, [bare, rows[1]])
    assert (found[0].loss_sum, found[0].tokens) == (0.0, 0)
    assert found[1] == losses(llama, [rows[1]])[0]
    assert losses(llama, [bare])[0].tokens == 0


def test_instructions_reach_the_source_row_by_row(llama, rows):
    class Source:
        def __init__(self):
            self.open, self.seen = 0, []

        def context(self, instructions):
            self.seen.append(instructions)
            return self

        def __enter__(self):
            self.open += 1

        def __exit__(self, *exc):
            self.open -= 1

    source = Source()
    inside = []
    llama.model.register_forward_hook(lambda *_: inside.append(source.open))
    told = [row | {"instruction": row["origin"]} for row in rows]
    losses(llama, told, source=source)
    assert sorted(text for batch in source.seen for text in batch) == sorted(row["origin"] for row in rows)
    assert set(inside) == {1}
    assert source.open == 0


def test_logprobs_give_the_divergence_of_two_models(llama, gpt2, rows):
    batch = Collator(3)(rows[:4])
    ours = zip(label_logprobs(llama, batch), label_logprobs(gpt2, batch), strict=True)
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in ours)
    keep = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        a, b = (m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (llama, gpt2))
    a, b = (x[:, :-1][keep].log_softmax(-1) for x in (a, b))
    assert kl == pytest.approx(float((a.exp() * (a - b)).sum()), rel=1e-4)


def test_results_are_ordinary_tensors(llama, rows):
    (chunk,) = label_logprobs(llama, Collator(3)(rows[:2]))
    assert not chunk.requires_grad
    assert not chunk.is_inference()
