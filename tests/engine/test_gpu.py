"""What is different on a GPU: Triton kernels, fused layers, 4-bit products, whole runs. Other tests run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, LlamaConfig, Qwen3Config

from qmemtune.adapters.queryable import QueryableMemoryConfig
from qmemtune.engine.fused import fused_layers
from qmemtune.engine.loss import LabelledLoss
from qmemtune.engine.run import train

pytestmark = pytest.mark.gpu

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
BASES = {
    "llama": LlamaConfig(**SMALL),
    "llama_bias": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=24),
    "gemma2": Gemma2Config(**SMALL, head_dim=16),
}
EXACT = {"rtol": 2e-5, "atol": 2e-5}
ROUNDED = {"rtol": 2e-2, "atol": 2e-2}


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """No TensorFloat-32, which would be all that a comparison of numbers sees."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [48, 2048, 5000])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    from qmemtune.engine.fused import kernels

    x = torch.randn(3, 7, width, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(width, device="cuda").to(dtype)
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype) * weight
    grad = torch.randn_like(expected)
    expected.backward(grad)
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    y, scale = kernels.rms_norm(x.detach(), weight, 1e-5)
    torch.testing.assert_close(y, expected.detach(), **tolerance)
    assert torch.equal(kernels.normed(x.detach(), weight, scale), y)
    torch.testing.assert_close(kernels.rms_norm_backward(grad, x.detach(), weight, scale), x.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_unit(dtype: torch.dtype) -> None:
    from qmemtune.engine.fused import kernels

    gate, up = (torch.randn(5, 11, 333, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    expected = F.silu(gate) * up
    grad = torch.randn_like(expected)
    expected.backward(grad)
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    torch.testing.assert_close(kernels.gated(gate.detach(), up.detach()), expected.detach(), **tolerance)
    for found, leaf in zip(kernels.gated_backward(grad, gate.detach(), up.detach()), (gate, up), strict=True):
        torch.testing.assert_close(found, leaf.grad, **tolerance)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [24, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding(dtype: torch.dtype, width: int, rows: int) -> None:
    from qmemtune.engine.fused import kernels

    x = torch.randn(2, 9, 5, width, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(rows, 1, 9, width, device="cuda").to(dtype) for _ in range(2))
    half = width // 2
    expected = x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
    # A gradient comes in another order in memory.
    grad = torch.randn(2, 5, 9, width, device="cuda").to(dtype)
    expected.backward(grad)
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    torch.testing.assert_close(kernels.rotated(x.detach(), cos, sin), expected.detach(), **tolerance)
    torch.testing.assert_close(kernels.rotated(grad, cos, sin, backward=True), x.grad, **tolerance)


@pytest.mark.parametrize("words", [17, 8192, 128_256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(dtype: torch.dtype, words: int) -> None:
    from qmemtune.engine.fused import kernels

    logits = (torch.randn(6, words, device="cuda") * 4).to(dtype)
    targets = torch.randint(0, words, (6,), device="cuda")
    leaf = logits.float().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(kernels.cross_entropy_(logits, targets), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.float(), leaf.grad, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rank", [3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_product(dtype: torch.dtype, rank: int, layers: int) -> None:
    from qmemtune.adapters.queryable import kernels

    routed = torch.randn(37, rank, rank, device="cuda") / rank**0.5
    # Of a wider tensor: a token's numbers lie together, not those of all tokens.
    states = torch.randn(37, layers * rank + 5, device="cuda").to(dtype)[:, : layers * rank]
    each = states.float().unflatten(1, (layers, rank))
    tolerance = EXACT if dtype == torch.float32 else ROUNDED
    for transposed, product in ((False, "nij,nlj->nli"), (True, "nji,nlj->nli")):
        expected = torch.einsum(product, routed, each).flatten(1).to(dtype)
        found = kernels.routed(routed, states, transposed=transposed)
        torch.testing.assert_close(found, expected, **tolerance)


# Layers and loss


def adapted(name: str, kind: str, quantization: str = "none") -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(BASES[name])
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, 1.0, 0.2)
    base.requires_grad_(False).cuda()
    if quantization == "nf4":
        base = quantised(base)
    common = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    memory = {"block_size": 2, "init_core_std": 0.3}
    config = LoraConfig(**common) if kind == "lora" else QueryableMemoryConfig(**common, **memory)
    model = get_peft_model(base, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or "queryable_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def quantised(base: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            setattr(base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.cuda())
    return base


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 1000, (3, 20), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def numbers(model: PeftModel, *, fuse: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one pass."""
    model.zero_grad()
    with fused_layers(model) if fuse else nullcontext():
        with nullcontext() if dtype is None else torch.autocast("cuda", dtype):
            logits = model(**batch(), use_cache=False).logits.float()
        logits[batch()["attention_mask"].bool()].log_softmax(-1)[:, 7].mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "queryable"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", BASES)
def test_fused_layers_have_the_numbers_of_the_plain_ones(name: str, quantization: str, kind: str) -> None:
    if quantization == "nf4" and name == "llama_bias":
        pytest.skip("the 4-bit layers of this test have no bias")
    from qmemtune.engine.fused import low_rank

    model = adapted(name, kind, quantization)
    expected = numbers(model, fuse=False)
    calls = []
    real = low_rank._AdaptedLayers.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank._AdaptedLayers, "apply", lambda *args: (calls.append(0), real(*args))[1])
        found = numbers(model, fuse=True)
    assert calls
    torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=2e-4)
    assert found[1].keys() == expected[1].keys()
    for parameter, gradient in expected[1].items():
        assert (found[1][parameter] - gradient).norm() <= 2e-4 * gradient.norm() + 1e-8, parameter


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_rounding_in_bfloat16_is_no_worse_than_that_of_the_plain_layers(kind: str) -> None:
    model = adapted("llama", kind)
    exact = numbers(model, fuse=False)[1]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()

    def distance(fuse: bool) -> float:
        found = numbers(model, fuse=fuse, dtype=torch.bfloat16)[1]
        return sum(((found[n] - g).norm() / g.norm()).item() for n, g in exact.items()) / len(exact)

    assert distance(fuse=True) <= 1.15 * distance(fuse=False)


def test_loss_at_labelled_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    from qmemtune.engine import loss as loss_module

    monkeypatch.setattr(loss_module, "GPU_BUFFER_BYTES", 20 * 1000 * 4)  # several chunks
    model = adapted("llama", "lora")
    labels = batch()["input_ids"].clone()
    labels[:, :4] = -100
    labels[1, 13:] = -100
    logits = model(**batch(), use_cache=False).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with LabelledLoss(model).installed():
        found, _ = model(**batch(), labels=labels)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)


# Whole runs


RUNS = {
    "lora": ("lora", ("adapter.dropout=0",)),
    "dropout": ("lora", ()),
    "queryable": ("queryable", ()),
    "prior": ("queryable", ("adapter.instruction_prior=0.5",)),
    "nf4": ("queryable", ("quantization=nf4",)),
    "int8": ("lora", ("quantization=int8", "adapter.dropout=0")),
    "checkpointing": ("queryable", ("trainer.gradient_checkpointing=true",)),
    "packing": ("lora", ("trainer.packing=true", "data.max_length=64", "adapter.dropout=0")),
    "padding_free": ("queryable", ("trainer.padding_free=true",)),
    "accumulation": ("queryable", ("trainer.gradient_accumulation_steps=2",)),
    "bfloat16": ("queryable", ("model.compute_dtype=bfloat16",)),
    "float16": ("lora", ("model.compute_dtype=float16", "adapter.dropout=0")),
    "8-bit optimizer": ("lora", ("optimizer.name=adamw_8bit", "adapter.dropout=0")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(composed: Callable[..., object], tmp_path: Path, name: str) -> None:
    adapter, options = RUNS[name]
    summary = train(composed(*options, adapter=adapter, run="gpu"))
    assert summary["peak_gpu_mib"] > 0
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "train"
    ]  # fmt: skip
    assert losses[-1] < losses[0] < 10
    assert 0 < summary["eval"]["loss"] < 10


def test_the_numbers_of_a_cpu(composed: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    same = ("trainer.padding_free=false", "trainer.length_grouping=true", "trainer.max_grad_norm=0")
    made = {}
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        summary = train(composed(*same, adapter="queryable", run=device))
        made[device] = summary["train_loss"], summary["eval"]["loss"]
    assert made["cuda"] == pytest.approx(made["cpu"], rel=2e-3)


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_a_resumed_run_ends_as_the_undisturbed_one(
    composed: Callable[..., object], adapter: str, tmp_path: Path
) -> None:
    options = ("trainer.max_steps=4", "trainer.save_steps=2", "trainer.deterministic=true")
    train(composed(*options, adapter=adapter, run="whole"))
    train(composed(*options, adapter=adapter, run="halved"), until=2)
    train(composed(*options, "resume=auto", adapter=adapter, run="halved"))
    whole, halved = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "halved"))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_a_compiled_run(composed: Callable[..., object], adapter: str) -> None:
    plain = train(composed("adapter.dropout=0", adapter=adapter) if adapter == "lora" else composed(adapter=adapter))
    options = ("trainer.compile=true", *(("adapter.dropout=0",) if adapter == "lora" else ()))
    compiled = train(composed(*options, adapter=adapter, run="compiled"))
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_verbs_behind_a_run(composed: Callable[..., object], tmp_path: Path, adapter: str, quantization: str) -> None:
    train(composed(f"quantization={quantization}", "model.compute_dtype=bfloat16", adapter=adapter))

    def verb(*words: str) -> str:
        code = "import sys; from qmemtune.cli.app import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run = str(tmp_path / "run")
    assert "loss" in verb("eval", run, "--json")
    assert verb("generate", run, "--max-new-tokens", "4", "--prompt", "reverse: apple river ->", "--json")
    verb("merge-export", run, "--force")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "merged", dtype=torch.float32)
    assert merged.config.num_hidden_layers == 4


def test_a_quantised_base_is_read_onto_the_gpu(tiny_llama_dir: Path) -> None:
    from qmemtune.config.schema import ModelConfig, QuantizationConfig
    from qmemtune.models.hardware import pick_device
    from qmemtune.models.loading import load_base

    base = load_base(ModelConfig(path=str(tiny_llama_dir)), QuantizationConfig(kind="nf4"), device=pick_device())
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir,
        dtype=torch.bfloat16,
        device_map="cuda",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        ),
    )  # fmt: skip
    ids = torch.arange(12, device="cuda")[None]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(base(ids).logits.float(), plain(ids).logits.float(), rtol=5e-2, atol=5e-2)
