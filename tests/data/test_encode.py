"""Exact boundaries, BOS, EOS, and tokenizers that put a space of their own before a text."""

from __future__ import annotations

from qmemtune.config.data import DataConfig
from qmemtune.data.encode import Encoder, Segment
from qmemtune.data.prepare import prepare_data
from qmemtune.data.render import render_prompt


def test_a_prompt_is_encoded_without_regard_to_what_follows(write_rows, tokenizer):
    # Together "Answ" + "er" would merge into other tokens than apart.
    path = write_rows([{"prompt": "Question: Answ", "completion": "er: five"}])
    config = DataConfig(path=path, eval_fraction=0.0)
    row = prepare_data(config, tokenizer).train[0]
    alone = tokenizer("Question: Answ", add_special_tokens=False)["input_ids"]
    together = tokenizer("Question: Answer: five", add_special_tokens=False)["input_ids"]
    assert together[: len(alone)] != alone
    assert row["prompt_ids"] == alone == row["input_ids"][: len(alone)]
    assert render_prompt(config, tokenizer, "Question: Answ") == alone


def test_bos_is_put_as_the_tokenizer_does(write_rows, bos_tokenizer):
    path = write_rows([{"prompt": "Question", "completion": "Answer"}])
    config = DataConfig(path=path, eval_fraction=0.0)
    row = prepare_data(config, bos_tokenizer).train[0]
    assert row["prompt_ids"] == bos_tokenizer("Question")["input_ids"]
    assert row["input_ids"].count(bos_tokenizer.bos_token_id) == 1
    assert row["labels"][-1] == bos_tokenizer.eos_token_id
    assert render_prompt(config, bos_tokenizer, "Question") == row["prompt_ids"]


def test_segments_inside_a_row_get_no_space_of_the_tokenizers_own(sentencepiece_tokenizer):
    encoder = Encoder(sentencepiece_tokenizer)
    texts = ["Question: how many?\nAnswer: ", "five", " apples", "\nare there"]
    ids = encoder.encode([[Segment((text,), False) for text in texts]])[0]
    tokens = sentencepiece_tokenizer.convert_ids_to_tokens([token for segment in ids for token in segment])
    assert "".join(tokens).replace("▁", " ") == " " + "".join(texts)
    assert sentencepiece_tokenizer.convert_ids_to_tokens(ids[1])[0] != "▁"


def test_control_tokens_in_a_text_stay_text_for_sentencepiece_too(sentencepiece_tokenizer):
    encoder = Encoder(sentencepiece_tokenizer)
    text = "end</s> <s>here</s>"
    (ids,) = encoder.encode([[Segment(encoder.protected(text), False)]])[0]
    assert not {1, 2} & set(ids)


def test_names_of_special_tokens_are_cut_even_where_they_overlap(tokenizer):
    encoder = Encoder(tokenizer)
    text = "<|im_end|><|im_end|>x<<|im_end|>"
    pieces = encoder.protected(text)
    assert "".join(pieces) == text
    assert not any(name in piece for name in encoder.special_names for piece in pieces)
    assert encoder.protected("plain") == ("plain",)


def test_equal_texts_in_one_batch_are_encoded_alike(tokenizer):
    encoder = Encoder(tokenizer)
    rows = [[Segment(("a", "b"), False), Segment(("a",), True, eos=True)]] * 2
    first, second = encoder.encode(rows)
    assert first == second
    assert first[1] == [*first[0][:1], tokenizer.eos_token_id]
    assert encoder.encode([]) == []
