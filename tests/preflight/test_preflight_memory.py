"""The estimate follows the real step; running out of memory ends with one message."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from qmemtune.adapters import apply_adapter
from qmemtune.cli.app import main
from qmemtune.config.data import SourceConfig
from qmemtune.config.missing import MISSING
from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.config.training import OptimizerConfig
from qmemtune.data.collate import Collator, model_inputs
from qmemtune.data.packing import without_padding
from qmemtune.engine.batching import BatchForm
from qmemtune.engine.fused import fused_layers
from qmemtune.engine.language import LabelledLoss
from qmemtune.engine.memory import estimate as estimate_module
from qmemtune.engine.memory.estimate import RunMemory
from qmemtune.engine.memory.exhausted import asked_bytes, explained
from qmemtune.engine.memory.fit import Memory, largest_batch, suggestions
from qmemtune.engine.memory.report import largest_workload, report
from qmemtune.engine.memory.weights import base_bytes, optimizer_bytes, quantised_layers
from qmemtune.engine.memory.workload import Workload
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.models import kernel_caches
from qmemtune.models.attention import rows_of, training_attention
from qmemtune.models.hardware import is_out_of_memory
from qmemtune.models.loading import load_base

CPU = torch.device("cpu")
WORK = Workload(rows=4, tokens=64, labelled=128)


def memory_of_run(run_config, *overrides) -> RunMemory:
    return RunMemory(run_config(*overrides).config, CPU, runtime=0)


class Saved:
    """Bytes of distinct storages that a forward pass keeps, weights left out."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("tokens", [64, 80])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_activations_are_those_that_a_real_forward_keeps(run_config, adapter, fused, padded, tokens):
    small = ["adapter.num_atoms=4", "adapter.key_dim=4", "adapter.block_size=2"] if adapter == "queryable" else []
    form = [f"trainer.fused_layers={fused}", f"trainer.padding_free={not padded}"]
    config = run_config(f"adapter={adapter}", "adapter.r=4", *form, *small).config
    work = Workload(rows=4, tokens=tokens, labelled=2 * tokens, together=None if padded else 4 * tokens)
    estimate = RunMemory(config, CPU, runtime=0).estimate(work)
    model = apply_adapter(load_base(config.model, config.quantization, device=CPU), config.adapter, seed=0).train()
    loss_of = LabelledLoss(model)
    ids = torch.randint(0, 300, (work.rows, tokens))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    rows = [{"input_ids": row.tolist(), "labels": own.tolist()} for row, own in zip(ids, labels, strict=True)]
    batch = Collator(0)(rows) if padded else without_padding(rows)
    if padded:
        batch["attention_mask"][0, -1] = 0
    saved = Saved(model)
    forms = fused_layers(model) if fused else nullcontext()
    kept = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t)
    with forms, training_attention(), rows_of(batch.get("row_lengths")), kept, loss_of.installed():
        loss, _ = model(**model_inputs(batch))
    assert loss.isfinite()
    assert estimate.activations == pytest.approx(sum(saved.kept.values()), rel=0.1)


def test_an_instruction_prior_is_traced_with_instructions(run_config, recwarn):
    config = run_config("adapter=queryable", "adapter.r=4", "adapter.instruction_prior=1").config
    without = run_config("adapter=queryable", "adapter.r=4").config
    found, other = (RunMemory(c, CPU, runtime=0).estimate(WORK) for c in (config, without))
    assert found.activations >= other.activations
    assert not [w for w in recwarn if "instruction prior" in str(w.message)]


def test_short_models_stand_for_a_long_one(run_config, monkeypatch):
    config = run_config("adapter=queryable", "adapter.r=4", "adapter.num_atoms=4", "adapter.block_size=1").config
    short = RunMemory(config, CPU, runtime=0).estimate(WORK)
    monkeypatch.setattr("qmemtune.engine.memory.tracing._decoder_layers", lambda decoder: None)
    assert short.total == pytest.approx(RunMemory(config, CPU, runtime=0).estimate(WORK).total, rel=0.02)


def test_more_work_takes_more_and_checkpointing_less(run_config):
    memory = memory_of_run(run_config)
    plain = memory.estimate(WORK)
    assert memory.estimate(WORK.with_rows(8)).total > plain.total
    assert memory.estimate(replace(WORK, tokens=128)).activations > 1.9 * plain.activations
    assert memory.estimate(replace(WORK, checkpointing=True)).activations < 0.5 * plain.activations
    assert plain.total == pytest.approx(sum(getattr(plain, part) for part in plain.PARTS))


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_weights_take_what_loaded_ones_take(run_config, tiny_llama_dir, kind):
    quantization = QuantizationConfig(kind=kind)
    skeleton = memory_of_run(run_config, f"quantization={kind}").model.get_base_model()
    base = load_base(ModelConfig(path=str(tiny_llama_dir), compute_dtype="float32"), quantization, device=CPU)
    real = sum(p.numel() * p.element_size() for p in base.parameters())
    assert skeleton is not None
    expected = memory_of_run(run_config, f"quantization={kind}").base_weights
    # Scales are not parameters.
    assert real <= expected <= 1.15 * real


def test_state_of_optimizers():
    weights = [nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(8))]
    elements = 64 * 128 + 8
    assert optimizer_bytes(weights, OptimizerConfig(name="sgd")) == 0
    assert optimizer_bytes(weights, OptimizerConfig(name="adamw")) == 8 * elements
    assert optimizer_bytes(weights, OptimizerConfig(name="adamw_8bit")) < 3 * elements
    assert optimizer_bytes(weights, OptimizerConfig(name="adafactor")) == 4 * (64 + 128 + 8)


def test_copies_of_4bit_weights_are_counted_where_they_are_made(run_config, monkeypatch):
    with_copies = memory_of_run(run_config, "quantization=nf4")
    without = memory_of_run(run_config, "quantization=nf4", "quantization.dequantized_copies=never")
    assert with_copies.copies > 0
    assert without.copies == 0
    assert without.estimate(WORK).dequantized_copies == 0


def test_kernels_that_torch_keeps_in_bfloat16_are_counted(run_config, monkeypatch):
    """More of them where each batch has shapes of its own; as many as the caches hold at most."""
    monkeypatch.setattr(estimate_module, "bf16_is_fast", lambda device: True)
    for name in kernel_caches.VARIABLES:
        monkeypatch.setenv(name, "100")
    kernel = kernel_caches.KERNEL_BYTES
    alike = replace(WORK, together=WORK.rows * WORK.tokens)
    config = run_config().config

    def kernels(dtype: torch.dtype, work: Workload) -> float:
        found = RunMemory(config, CPU, runtime=0, dtype=dtype).estimate(work)
        assert found.total >= found.kernels
        return found.kernels

    assert kernels(torch.bfloat16, replace(alike, together=200)) == 100 * kernel
    assert kernels(torch.bfloat16, WORK) == 100 * kernel
    assert kernels(torch.bfloat16, alike) == kernel_caches.OF_A_BATCH * kernel
    assert kernels(torch.float32, WORK) == 0
    monkeypatch.setenv(kernel_caches.VARIABLES[0], "20")
    monkeypatch.delenv(kernel_caches.VARIABLES[1])
    assert kernels(torch.bfloat16, WORK) == kernel_caches.WITHOUT_A_BOUND * kernel
    monkeypatch.setenv(kernel_caches.VARIABLES[1], "10")
    assert kernels(torch.bfloat16, WORK) == kernels(torch.bfloat16, alike) == 20 * kernel


def test_the_largest_batch_that_fits(run_config):
    memory = memory_of_run(run_config)
    work = WORK.with_rows(16)
    assert largest_batch(memory, work, memory.estimate(work.with_rows(5)).total) == 5
    assert largest_batch(memory, work, memory.estimate(work).total) == 16
    assert largest_batch(memory, work, 1.0) == 0


FAILURES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), 2 * 2**30),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4194304 bytes. Error code 12 (Cannot allocate memory)"
        ),
        4 * 2**20,
    ),
    (MemoryError(), None),
]


@pytest.mark.parametrize(("failure", "asked"), FAILURES)
def test_what_the_allocator_says_is_understood(failure, asked):
    assert is_out_of_memory(failure)
    assert asked_bytes(failure) == asked


@pytest.mark.parametrize("failure", [FAILURES[1][0], FAILURES[2][0]])
def test_running_out_of_memory_is_one_message(run_config, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr("qmemtune.engine.language.LanguageTask.loss", fail)
    with pytest.raises(UserError) as raised:
        train(run_config("trainer.per_device_train_batch_size=8", "trainer.max_steps=1"))
    (finding,) = raised.value.findings
    assert "memory ran out" in finding.problem
    assert "estimated at" in finding.problem
    assert asked_bytes(failure) is None or "4 MiB more were asked for" in finding.problem
    assert finding.where == "a batch of 8 rows of up to 15 tokens"


def test_the_message_names_two_settings_that_fit(run_config):
    memory = memory_of_run(run_config)
    known = Memory(memory, WORK.with_rows(16))
    # What fits beside eight rows, but not nine: eight keep the rows of a step.
    limit = memory.estimate(known.workload.with_rows(9)).total
    error = explained(MemoryError(), known, lambda: limit)
    fix = error.findings[0].fix
    assert all(way.total <= limit for way in suggestions(memory, known.workload, limit))
    assert "trainer.per_device_train_batch_size=8 trainer.gradient_accumulation_steps=2" in fix
    assert "trainer.gradient_checkpointing=true" in fix


def test_other_failures_pass(run_config, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    monkeypatch.setattr("qmemtune.engine.language.LanguageTask.loss", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        train(run_config("trainer.max_steps=1"))


def test_estimate_needs_no_weights_and_no_rows(run_config, tiny_llama_dir, tmp_path, capsys):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    assert main(["estimate", f"model.path={folder}", "data.max_length=64", "--json", "--device", "cuda"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cuda"
    assert found["workload"]["tokens"] == 64
    assert found["total_mib"] == pytest.approx(sum(found["parts_mib"].values()), abs=1)
    assert "no data are given" in found["notes"][0]


@pytest.mark.parametrize("packing", [False, True])
def test_fewer_rows_than_a_batch_holds_are_one_smaller_batch(run_config, packing):
    config = run_config("trainer.per_device_train_batch_size=64", f"trainer.packing={packing}").config
    found = report(config, "cpu")
    assert found["workload"]["rows"] == (1 if packing else 16)
    assert found["total_mib"] > 0


def test_a_model_that_cannot_be_estimated_is_no_fault_of_ours(run_config, monkeypatch):
    def fail(*_):
        raise RuntimeError("Expected inputs of BF16 type\nand more")

    monkeypatch.setattr("qmemtune.engine.memory.report.RunMemory.estimate", fail)
    with pytest.raises(UserError, match="cannot be estimated: RuntimeError: Expected inputs of BF16 type"):
        report(run_config().config, "cpu")


def test_estimate_reads_the_rows_of_a_mixture(run_config):
    config = run_config().config
    mixture = replace(config.data, path=MISSING, sources={"a": SourceConfig(path=config.data.path)})
    form = BatchForm.of(config, torch.device("cpu"))
    workload, notes = largest_workload(replace(config, data=mixture), form)
    assert notes == []
    assert workload == largest_workload(config, form)[0]


def test_rows_without_padding_are_counted_with_the_longest_of_them():
    work = Workload(rows=8, tokens=2000, labelled=1200, accumulation=2, together=2400)
    assert work.lengths == [57] * 6 + [58, 2000]
    # The one row of a batch may be the longest, with all that it has in the loss.
    assert work.with_rows(1) == Workload(1, 2000, 1000, accumulation=16, together=2000)
    assert work.with_rows(1).lengths == [2000]
    assert work.with_rows(16) == Workload(16, 2000, 2400, accumulation=1, together=4800)
    assert work.with_tokens(100) == Workload(8, 100, 400, accumulation=2, together=800)
    assert work.with_tokens(1000) == Workload(8, 1000, 1200, accumulation=2, together=2400)
    padded = Workload(rows=4, tokens=100, labelled=200)
    assert padded.lengths == [100] * 4
    assert padded.with_rows(2).with_tokens(50) == Workload(2, 50, 50, accumulation=2)


def test_the_batch_of_a_run_without_padding_has_its_rows_own_tokens(run_config):
    config = run_config().config
    workload, _ = largest_workload(config, BatchForm(packed=False, padding_free=True, length_grouping=False))
    padded, _ = largest_workload(config, BatchForm(packed=False, padding_free=False, length_grouping=True))
    assert padded.together is None
    assert workload.tokens == padded.tokens
    assert workload.tokens <= workload.together == sum(workload.lengths) <= padded.rows * padded.tokens
    assert len(workload.lengths) == workload.rows == padded.rows


def test_a_run_that_hands_its_mask_to_the_kernel_is_traced_with_it(run_config):
    work = Workload(rows=8, tokens=128, labelled=512, together=1024)
    own, kernel = (
        memory_of_run(run_config, "trainer.padding_free=true", *more).estimate(work)
        for more in ((), ("model.attn_implementation=sdpa",))
    )
    assert kernel.activations + kernel.temporaries > own.activations + own.temporaries + 1024 * 1024


def test_estimate_is_shown_by_part(run_config, tiny_llama_dir, capsys):
    assert main(["estimate", f"model.path={tiny_llama_dir}", "data.max_length=32", "quantization=nf4"]) == 0
    out = capsys.readouterr().out
    assert "activations" in out
    assert "fits into" in out


def test_weights_without_quantisation(run_config):
    base = memory_of_run(run_config).model.get_base_model()
    assert quantised_layers(base, QuantizationConfig(kind="none")) == []
    linear = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantised = quantised_layers(linear, QuantizationConfig(kind="nf4", double_quant=False))
    assert base_bytes(linear, quantised, QuantizationConfig(kind="nf4", double_quant=False), 4) == 64 * 64 * 0.5625
