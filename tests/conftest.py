"""Fixtures for every test: an offline environment, and a tiny Llama with a real tokenizer on disk."""

from __future__ import annotations

import os

# Before torch and the Hub client are imported: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more than one thread each makes all of them slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CORPUS = [
    "system user assistant",
    "Reverse the words of this sentence: the quick brown fox jumps over the lazy dog.",
    "Sort these numbers from small to large: 12 7 33 5 81 90 46 28.",
    "What is the capital of France? The capital of France is Paris.",
    "Natalia sold 48 clips in April and half as many in May. How many did she sell altogether? #### 72",
    "Below is an instruction that describes a task. Write a response that completes the request.",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", default=False, help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip ``slow`` and ``gpu`` tests where they cannot or should not run, with the reason in the report."""
    if not config.getoption("--slow"):
        mark_all(items, "slow", pytest.mark.skip(reason="slow: run with --slow or make test-slow"))
    if any("gpu" in item.keywords for item in items) and not cuda_is_available():
        mark_all(items, "gpu", pytest.mark.skip(reason="needs a CUDA GPU"))


def mark_all(items: list[pytest.Item], keyword: str, mark: pytest.MarkDecorator) -> None:
    for item in items:
        if item.get_closest_marker(keyword):
            item.add_marker(mark)


@lru_cache(maxsize=1)
def cuda_is_available() -> bool:
    """Whether this machine has a GPU; asked before a test hides it. Without NVIDIA's driver torch need not be read."""
    if not Path("/proc/driver/nvidia").exists() and not any(Path("/dev").glob("nvidia*")):
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are not marked ``gpu`` run on the CPU, on every machine; so do the processes they start."""
    if "gpu" not in request.keywords and cuda_is_available():
        import torch

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of this session (converted GGUF files and the like); one for all tests of a worker."""
    return tmp_path_factory.mktemp("qmemtune-cache")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, session_cache: Path) -> None:
    """No network, no cache of the user's; also for the processes a test starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    if "QMEMTUNE_TEST_CACHE" in os.environ:
        # A conversion takes seconds: keep it between runs where the developer says so.
        monkeypatch.setenv("QMEMTUNE_CACHE", os.environ["QMEMTUNE_TEST_CACHE"])
    else:
        monkeypatch.setenv("QMEMTUNE_CACHE", str(session_cache))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 4-layer Llama (hidden 32, fp32 safetensors) and a byte-level BPE tokenizer.

    The tokenizer has ``<|endoftext|>`` as begin, ``<|im_end|>`` as end, ``<|pad|>`` for padding, and a ChatML
    template. Made once a worker. Tests must not write into it.
    """
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tiny_llama(folder)
    return folder


def make_tiny_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)


def make_tokenizer():
    """A byte-level BPE tokenizer that spells any text: 256 bytes, a few merges, the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Path]:
    """(folder, tokenizer, seed=, pooling=, width=) -> the folder with a tiny sentence encoder."""
    return make_sentence_encoder


POOLING = "1_Pooling"


def make_sentence_encoder(
    folder: Path, tokenizer, *, seed: int = 0, pooling: str = "mean_tokens", width: int = 16
) -> Path:
    """A tiny folder as sentence-transformers writes it."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / POOLING).mkdir()
    (folder / POOLING / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}), encoding="utf-8")
    kinds = {"": "sentence_transformers.models.Transformer", POOLING: "sentence_transformers.models.Pooling"}
    modules = [{"path": path, "type": kind} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    return folder


GGUF_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""Chat template in the files of ``write_gguf``."""


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """(folder, file, extra=, without=) -> None: the Llama in the folder as a GGUF file."""
    return make_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file. Tests must not write into it."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    make_gguf(tiny_llama_dir, file)
    return file


def make_gguf(folder: Path, file: Path, *, extra: Callable = lambda writer: None, without: str | None = None) -> None:
    """The Llama in ``folder`` as a GGUF file with Q8_0 matrices, as llama.cpp lays it out.

    ``extra`` adds to it; tensors with ``without`` between the dots of their name there are left out.
    """
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(GGUF_TEMPLATE)
    extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:  # llama.cpp interleaves the two halves of each rotary pair
            value = value.view(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        array, name = value.numpy(), names.get_name(key, try_suffixes=(".weight",))
        if without in name.split("."):
            continue
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
