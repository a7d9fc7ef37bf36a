"""Everything that would stop a run is found before it starts, and told in one report."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch

from qmemtune.config.compose import compose
from qmemtune.engine import preflight as preflight_module
from qmemtune.engine.plan import plan
from qmemtune.engine.preflight import preflight
from qmemtune.engine.run import train
from qmemtune.errors import UserError

CPU = torch.device("cpu")


def problems(raised) -> str:
    return " | ".join(str(finding) for finding in raised.value.findings)


@pytest.mark.parametrize("start", [plan, train])
def test_all_findings_come_together_and_nothing_is_written(run_config, tmp_path, monkeypatch, start):
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda path: namedtuple("D", "total used free")(1, 1, 0))
    monkeypatch.setattr("qmemtune.models.bitsandbytes.find_spec", lambda name: None)
    loaded = []
    monkeypatch.setattr("qmemtune.engine.setup.load_base", lambda *args, **kwargs: loaded.append(args))
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"prompt": "a"}\n' * 4)
    made = run_config(
        f"data.path={bad}",
        "data.format=prompt_completion",
        "adapter.target_modules=[q_prj]",
        "quantization=nf4",
        "tracking.backends=[trackio]",
    )
    monkeypatch.setattr("qmemtune.engine.tracking.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        start(made)
    text = problems(raised)
    assert "q_prj" in text
    assert "bitsandbytes, which is not installed" in text
    assert "trackio is not installed" in text
    assert str(bad) in text
    assert loaded == []
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_missing_model_is_told_once(run_config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as raised:
        plan(run_config(f"model.path={tmp_path / 'empty'}"))
    assert len([f for f in raised.value.findings if "config.json" in f.problem]) == 1


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_only_lora_may_be_in_the_output_head(run_config, adapter):
    made = run_config(f"adapter={adapter}", "adapter.target_modules=[q_proj,lm_head]")
    if adapter == "lora":
        plan(made)
        return
    with pytest.raises(UserError, match="the output head cannot have a queryable memory"):
        plan(made)


def test_a_warm_up_that_outlasts_the_epochs_is_refused(run_config):
    with pytest.raises(UserError, match=r"warm-up of 8 steps does not end within the run's 8 steps"):
        plan(run_config("trainer.num_train_epochs=2", "optimizer.warmup_steps=8"))
    plan(run_config("trainer.num_train_epochs=2", "optimizer.warmup_steps=7"))
    plan(run_config("trainer.num_train_epochs=0.1"))


def test_a_full_disk_is_found_out(run_config, monkeypatch):
    usage = namedtuple("D", "total used free")(10, 10, 1000)
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="disk has 0 MiB left"):
        plan(run_config())


def test_checkpoints_on_disk_are_no_larger_than_promised(run_config, tmp_path):
    made = run_config("trainer.max_steps=3", "trainer.save_steps=1", "trainer.save_total_limit=2")
    checked = preflight(made.config, device=CPU)
    model = checked.memory.run.model
    promised = preflight_module.disk_bytes(made.config, model, checked.steps)
    train(made)
    written = [
        f
        for f in (tmp_path / "run" / "checkpoints").rglob("*")
        if f.name in ("adapter_model.safetensors", "optimizer.pt")
    ]
    assert sum(f.stat().st_size for f in written) <= 1.5 * promised


def test_a_checkpoint_that_does_not_fit_stands_beside_other_findings(run_config, tmp_path):
    train(run_config("trainer.max_steps=1"))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError) as raised:
        plan(run_config("trainer.max_steps=2", "adapter.r=2", "resume=auto", "trainer.per_device_train_batch_size=2"))
    text = problems(raised)
    assert "r=4" in text
    assert "rows" in text


def test_the_checkpoint_of_an_initialisation_that_needs_weights_is_taken(run_config, tmp_path):
    train(run_config("trainer.max_steps=1", "adapter.init=olora"))
    (tmp_path / "run" / "summary.json").unlink()
    planned = plan(run_config("trainer.max_steps=2", "adapter.init=olora", "resume=auto", "resume.allow_changes=true"))
    assert planned["first_step"] == 1


def test_a_model_that_is_quantised_already_is_refused(run_config, tiny_llama_dir, tmp_path):
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised already"):
        plan(run_config(f"model.path={folder}", "quantization=nf4"))


def test_a_regression_passes_too():
    planned = plan(compose(["recipe=regression_noisy", "data.regression.rows=64", "trainer.max_steps=2"]))
    assert planned["rows"] == 64
    assert planned["memory"] is None


def test_a_run_that_does_not_fit_is_warned_about_and_still_starts(run_config, monkeypatch):
    made = run_config("trainer.per_device_train_batch_size=8", "trainer.max_steps=1")
    known = preflight(made.config, device=CPU).memory
    memory, workload = known.run, known.workload
    limit = memory.estimate(workload.with_rows(5)).total
    monkeypatch.setattr(preflight_module, "capacity", lambda device: limit - memory.runtime + memory.runtime)
    monkeypatch.setattr("qmemtune.engine.memory.estimate.resident_bytes", lambda: memory.runtime)
    planned = plan(made)
    (warning,) = [line for line in planned["warnings"] if "largest batch" in line]
    assert "the largest batch that fits is 5" in warning
    assert "trainer.per_device_train_batch_size=5" in warning
    assert train(made)["steps"] == 1
