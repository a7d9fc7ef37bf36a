"""Greedy answers do not depend on the batch, and are compared as the pattern says."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from qmemtune.config.evaluation import ExactMatchConfig, SamplesConfig
from qmemtune.errors import UserError
from qmemtune.evaluation.decode import generation_batches, greedy_answers, until_end
from qmemtune.evaluation.exact_match import compile_pattern, extract_answer, row_matches
from qmemtune.evaluation.samples import evenly_spaced, sample_answers


def one_by_one(model, tokenizer, row, count):
    """Greedy decoding in the plainest way: no cache, no batch."""
    ids = list(row["prompt_ids"])
    with torch.no_grad():
        for _ in range(count):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[len(row["prompt_ids"]) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_answers_do_not_depend_on_padding(model, tokenizer, rows, batch_size):
    found = greedy_answers(model, tokenizer, rows, max_new_tokens=8, batch_size=batch_size)
    assert [answer.text for answer in found] == [one_by_one(model, tokenizer, row, 8) for row in rows]


def test_the_head_sees_contiguous_states_only(model, tokenizer, rows, monkeypatch):
    """Else torch copies the head's weight for every row of a batch: gigabytes for a small model."""
    head, seen = model.get_output_embeddings(), []
    forward = head.forward

    def watched(states):
        seen.append(states.is_contiguous())
        return forward(states)

    monkeypatch.setattr(head, "forward", watched)
    greedy_answers(model, tokenizer, rows, max_new_tokens=3, batch_size=4)
    assert len(seen) >= 3
    assert all(seen)
    assert not head._forward_pre_hooks


def test_the_models_sampling_settings_are_ignored_and_kept(llama, tokenizer, rows):
    expected = greedy_answers(llama, tokenizer, rows, max_new_tokens=6, batch_size=4)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, min_length=99
    )
    llama.generation_config = own
    assert greedy_answers(llama, tokenizer, rows, max_new_tokens=6, batch_size=4) == expected
    assert llama.generation_config is own
    assert own.repetition_penalty == 9.0


def test_a_trained_model_matches(llama, tokenizer, rows):
    """The model learns five rows by heart; the others it cannot know."""
    learned = [row | {"answer": row["answer"]} for row in distinct_prompts(rows)[:5]]
    learn(llama, learned)
    others = [row | {"answer": "something else"} for row in learned[:2]]
    found = row_matches(llama, tokenizer, learned + others, ExactMatchConfig(max_new_tokens=60), batch_size=4)
    assert [row.correct for row in found] == [True] * 5 + [False] * 2
    assert [row.expected for row in found[:5]] == [row["answer"] for row in learned]
    assert [row.group for row in found[:5]] == [row["group"] for row in learned]


def test_every_end_token_of_the_model_ends_an_answer(llama, tokenizer, rows):
    first = greedy_tokens(llama, rows[0], 4)
    llama.generation_config.eos_token_id = [tokenizer.eos_token_id, first[2]]
    (found,) = greedy_answers(llama, tokenizer, rows[:1], max_new_tokens=6, batch_size=4)
    assert found == (tokenizer.decode(until_end(first, [first[2]]), skip_special_tokens=True), False)


def test_an_empty_prompt_starts_from_the_begin_token(llama, tokenizer):
    empty = {"prompt_ids": [], "answer": ""}
    begin = {"prompt_ids": [tokenizer.bos_token_id], "answer": ""}
    a, b = greedy_answers(llama, tokenizer, [empty, begin], max_new_tokens=4, batch_size=4)
    assert a == b


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("  a b \n", None, "a b"),
        ("first #### 3, then\n#### 72 ", r"#### (.+)", "72"),
        ("so 3 and 4", r"\d", "4"),
        ("none here", r"#### (.+)", None),
        ("x or y", r"(z)|y", None),
    ],
)
def test_extraction(text, pattern, answer):
    assert extract_answer(text, compile_pattern(pattern)) == answer


def test_an_output_without_an_answer_is_wrong(llama, tokenizer, rows):
    asked = [rows[0] | {"answer": "why: #### 5"}, rows[1] | {"answer": "no mark"}]
    config = ExactMatchConfig(answer_pattern=r"#### (\d+)", max_new_tokens=3)
    found = row_matches(llama, tokenizer, asked, config, batch_size=2)
    assert [(row.correct, row.found, row.cut) for row in found] == [(False, False, True)] * 2
    assert [row.expected for row in found] == ["5", "no mark"]


def test_useless_patterns_are_named(llama, tokenizer, rows):
    for pattern in ("(", "#### never"):
        with pytest.raises(UserError) as error:
            row_matches(llama, tokenizer, rows, ExactMatchConfig(answer_pattern=pattern), batch_size=2)
        assert error.value.findings[0].where == "evaluation.exact_match.answer_pattern"


def test_short_rows_go_in_larger_batches():
    short, long = list(generation_batches([12] * 300, 20, 16)), list(generation_batches([900] * 40, 300, 16))
    assert [len(batch) for batch in short] == [128, 128, 44]
    assert [len(batch) for batch in long] == [16, 16, 8]
    assert sorted(i for batch in generation_batches([3, 99, 5, 700], 10, 2) for i in batch) == [0, 1, 2, 3]


def test_samples_are_spread_over_the_rows(llama, tokenizer, rows):
    found = sample_answers(llama, tokenizer, rows, SamplesConfig(count=3, max_new_tokens=5), batch_size=4)
    chosen = evenly_spaced(rows, 3)
    assert [chosen.index(row) for row in chosen] == [0, 1, 2]
    assert [row["origin"] for row in chosen] == ["rows:0", "rows:4", "rows:8"]
    assert [sample.expected for sample in found] == [row["answer"] for row in chosen]
    assert [sample.output for sample in found] == [one_by_one(llama, tokenizer, row, 5) for row in chosen]
    assert found[0].prompt == tokenizer.decode(rows[0]["prompt_ids"])
    assert len(evenly_spaced(rows, 99)) == len(rows)


def greedy_tokens(model, row, count):
    ids = list(row["prompt_ids"])
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(row["prompt_ids"]) :]


def distinct_prompts(rows):
    return list({tuple(row["prompt_ids"]): row for row in rows}.values())


def learn(model, rows):
    from qmemtune.data.collate import Collator

    batch = {name: value for name, value in Collator(0)(rows).items() if name != "instruction"}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
