"""trainer.compile: the same loss and gradients from one graph, in training steps only; its needs are checked first."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from qmemtune.adapters import apply_adapter, memory_of
from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.compose import compose
from qmemtune.config.schema import ModelConfig, QuantizationConfig
from qmemtune.engine import compiling
from qmemtune.engine.loss import LabelledLoss
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.models.loading import load_base

CPU = torch.device("cpu")


@pytest.fixture
def traced_only(monkeypatch):
    """Graphs are traced as ever, and then run as they are: no C++ compiler, and fast."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiling.torch, "compile", partial(torch.compile, backend="eager"))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def adapted(folder, adapter):
    config = {"lora": LoraConfig, "queryable": partial(QueryableConfig, block_size=1)}[adapter](r=4)
    base = load_base(
        ModelConfig(path=str(folder), compute_dtype="float32"), QuantizationConfig(kind="none"), device=CPU
    )
    model = apply_adapter(base, config, seed=0).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def step(model, loss_of, length=12):
    ids = torch.randint(3, 200, (3, length), generator=torch.Generator().manual_seed(length))
    with loss_of.installed():
        loss, _ = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_loss_and_gradients_are_the_plain_ones(tiny_llama_dir, traced_only, adapter):
    model = adapted(tiny_llama_dir, adapter)
    plain, compiled = LabelledLoss(model), LabelledLoss(model, compiled=True)
    # Inputs' means are measured in the first step and found in the second: neither is compiled.
    for length in (12, 12, 12, 9):
        loss, gradients = step(model, plain, length)
        found, found_gradients = step(model, compiled, length)
        torch.testing.assert_close(found, loss)
        assert gradients.keys() == found_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert not traced_only["graph_break"]
    assert traced_only["stats"]["unique_graphs"]
    assert traced_only["stats"]["unique_graphs"] <= 2  # the second length makes one that holds for all


def test_evaluations_are_not_compiled(tiny_llama_dir, traced_only):
    model = adapted(tiny_llama_dir, "queryable")
    loss_of = LabelledLoss(model, compiled=True)
    ids = torch.randint(3, 200, (2, 8))
    with torch.no_grad(), loss_of.installed():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert not traced_only["stats"]


def test_the_first_compiled_step_measures_mean_inputs(tiny_llama_dir, traced_only):
    model = adapted(tiny_llama_dir, "queryable")
    step(model, LabelledLoss(model, compiled=True))
    means = memory_of(model).queryable_input["default"]
    assert all(mean.any() for mean in means.buffers())


def test_without_a_compiler_a_run_does_not_start(monkeypatch, tiny_llama_dir):
    monkeypatch.setenv("CXX", "no-such-compiler")
    command = [sys.executable, "-c", "import sys; from qmemtune.cli.app import main; sys.exit(main())", "train"]
    given = [f"model.path={tiny_llama_dir}", "data.path=generated:word_lists", "trainer.compile=true", "--dry-run"]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_recomputed_layers_of_a_memory_are_refused():
    compose(["recipe=quickstart", "adapter=lora", "trainer.compile=true", "trainer.gradient_checkpointing=true"])
    with pytest.raises(UserError, match="recomputed layers"):
        compose(["recipe=quickstart", "trainer.compile=true", "trainer.gradient_checkpointing=true"])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_a_compiled_run_ends_as_a_plain_one(tiny_llama_dir, tmp_path, adapter):
    """A minute or more: the C++ compiler runs."""
    try:
        compiling.check_compiler(CPU)
    except UserError as error:
        pytest.skip(str(error))
    losses = []
    for switched_on in (False, True):
        composed = compose(
            [
                f"model.path={tiny_llama_dir}", "model.compute_dtype=float32", "data.path=generated:word_lists",
                "quantization=nf4", f"adapter={adapter}", "adapter.r=4", "trainer.max_steps=4",
                "trainer.per_device_train_batch_size=4", "evaluation.max_rows=8", f"trainer.compile={switched_on}",
                f"run_dir={tmp_path / str(switched_on)}",
            ]
        )  # fmt: skip
        losses.append(train(composed)["eval"]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
