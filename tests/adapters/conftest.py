"""Tiny models of five families, and what the adapter tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qmemtune.adapters import QueryableMemoryConfig, memory_of
from qmemtune.adapters.queryable import QueryableMemory
from qmemtune.adapters.queryable.packing import keep_unpacked

VOCAB = 64
LAYERS = 4
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**COMMON))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**COMMON))


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, sliding_window=6, layer_types=kinds))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=6))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "gpt2": _gpt2,
}


@dataclass(frozen=True)
class Family:
    """One architecture: makes its tiny base, adapted or not, always with the same weights."""

    name: str

    def base(self, seed: int = 0) -> PreTrainedModel:
        """A random float32 base in evaluation mode."""
        torch.manual_seed(seed)
        return FAMILIES[self.name]().float().eval()

    @staticmethod
    def config(**options: Any) -> QueryableMemoryConfig:
        """Adapter options whose routes differ visibly from token to token once the model is stirred."""
        defaults: dict[str, Any] = {
            "r": 4,
            "num_atoms": 6,
            "key_dim": 8,
            "block_size": 2,
            "temperature": 2.0,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        }
        return QueryableMemoryConfig(**{**defaults, **options})

    def adapted(self, *, stirred: bool = True, base: nn.Module | None = None, **options: Any) -> PeftModel:
        """The base with a queryable memory; ``stirred`` moves it away from its trivial start."""
        model = get_peft_model(self.base() if base is None else base, self.config(**options))
        if stirred:
            stir(model)
        return model.eval()

    @staticmethod
    def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
        """Token ids without special ones, (rows, length)."""
        return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def stir(model: nn.Module, seed: int = 1) -> None:
        stir(model, seed)

    @staticmethod
    def memory(model: nn.Module) -> QueryableMemory:
        found = memory_of(model)
        assert found is not None
        return found

    @staticmethod
    def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
        """Logits without gradients, (B, T, V)."""
        with torch.no_grad():
            return model(input_ids=ids, **inputs).logits

    def routes(self, model: nn.Module, ids: Tensor, **inputs: Any) -> dict[int, Tensor]:
        """The route of every block, (B, T, M)."""
        memory, seen = self.memory(model), {}

        def observe(name: str, block: int, weights: Tensor, mask: Tensor | None) -> None:
            seen[block] = weights

        memory.observer = observe
        try:
            self.logits(model, ids, **inputs)
        finally:
            memory.observer = None
        return seen

    @staticmethod
    def loss(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
        """Next-token loss of the whole rows, with gradients."""
        return model(input_ids=ids, labels=ids, **inputs).loss

    @staticmethod
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        """Gradients of all trainable parameters, which are then cleared; every one must have received some."""
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} got no gradient"
                found[name] = parameter.grad.clone()
        model.zero_grad(set_to_none=True)
        return found


def stir(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter parameter a value of the size it may have after training, so that routing matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "queryable_" not in name:
                continue
            scale = 0.15 if "queryable_A" in name or "queryable_B" in name else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        generator.manual_seed(seed)
        for name, buffer in model.named_buffers():
            if "queryable_input" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and sums keep one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each architecture in turn."""
    return Family(request.param)


@pytest.fixture
def llama() -> Family:
    """One architecture, for what does not depend on it."""
    return Family("llama")


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's name -> a folder with its tiny base, saved once a session."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            Family(name).base().save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def quantised(family_dirs: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """(family name, "nf4" or "int8") -> its tiny base, quantised by bitsandbytes on the CPU."""

    def load(name: str, kind: str = "nf4") -> PreTrainedModel:
        if kind == "nf4":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float32,
                bnb_4bit_use_double_quant=True,
            )
        else:
            config = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(
            family_dirs(name), quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        # Where the processor allows it, a first forward without gradients would repack the weights of the bare base.
        keep_unpacked(model)
        return model.eval()

    return load
