"""Distilling a routed memory into a static LoRA."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.data import SourceConfig
from qmemtune.config.missing import MISSING
from qmemtune.engine.interrupt import Interrupted
from qmemtune.engine.trainer import RunTrainer
from qmemtune.errors import RunFailed
from qmemtune.export import export_run

ROUTED = QueryableConfig(r=4, num_atoms=4, key_dim=4, block_size=2, temperature=4.0, init_core_std=0.6)
OPTIONS = {"format": "lora", "fold": "distill", "distill_steps": 48, "distill_learning_rate": 0.01, "max_kl": 0.01}


def test_distilling_comes_nearer_than_folding(make_run) -> None:
    found = {}
    for fold in ("mean", "least_squares", "distill"):
        run, config = make_run(ROUTED, **{**OPTIONS, "fold": fold, "force": True, "rank": 8})
        found[fold] = export_run(run, config)
    kl = {fold: result["fidelity"]["kl_mean"] for fold, result in found.items()}
    assert kl["distill"] < 0.7 * min(kl["mean"], kl["least_squares"])
    distillation = found["distill"]["distillation"]
    assert distillation["kl"] < distillation["kl_start"]
    assert distillation["rank"] == 8
    plain = AutoModelForCausalLM.from_pretrained(config.model.path)
    adapted = PeftModel.from_pretrained(plain, found["distill"]["path"])
    assert adapted.peft_config["default"].r == 8
    assert torch.isfinite(adapted(torch.arange(8)[None]).logits).all()


def test_an_interrupted_distillation_goes_on_and_a_finished_one_is_kept(make_run, monkeypatch) -> None:
    run, config = make_run(ROUTED, **{**OPTIONS, "force": True, "distill_steps": 12})
    end_step = RunTrainer.end_step

    def stop_at_five(self) -> None:
        if self.state.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        end_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "end_step", stop_at_five)
        with pytest.raises(Interrupted, match="stopped at step 5") as caught:
            export_run(run, config)
    assert "same command again" in caught.value.findings[0].fix
    assert list(run.export.iterdir()) == []
    resumed = export_run(run, config)
    monkeypatch.setattr(RunTrainer, "train", None)
    again = export_run(run, config)  # the finished one, at once
    assert again["fidelity"]["kl_mean"] == resumed["fidelity"]["kl_mean"]
    monkeypatch.undo()
    run, config = make_run(ROUTED, **{**OPTIONS, "force": True, "distill_steps": 12})
    whole = export_run(run, config)
    assert resumed["fidelity"]["kl_mean"] == pytest.approx(whole["fidelity"]["kl_mean"], rel=1e-3)


def test_a_finished_distillation_is_kept_whatever_is_made_of_it(make_run, monkeypatch) -> None:
    run, config = make_run(ROUTED, **{**OPTIONS, "distill_steps": 4, "max_kl": 1e-6})
    with pytest.raises(RunFailed):
        export_run(run, config)
    pushed = []
    monkeypatch.setattr(RunTrainer, "train", None)
    monkeypatch.setattr("qmemtune.export.run.push", lambda folder, export: pushed.append(export.push_to_hub))
    given = config.export
    for options in (
        {"max_kl": 0.01, "max_loss_increase": 50.0, "fidelity_rows": 4},
        {"format": "merged", "dtype": "bfloat16"},
        {"push_to_hub": "tuned", "license": "apache-2.0"},
        {"path": str(run.path / "elsewhere")},
    ):
        config.export = dataclasses.replace(given, force=True, **options)
        assert export_run(run, config)["distillation"]["steps"] > 0
    assert pushed == ["tuned"]
    assert len(list(run.distilled.iterdir())) == 1


@pytest.mark.parametrize("changed", ["rows to distil on", "rows to fold on", "peak learning rate"])
def test_what_changes_a_distillation_makes_another(make_run, rows: Path, tmp_path: Path, changed: str) -> None:
    calibration = tmp_path / "deployment.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    calibration.write_text("".join(lines), encoding="utf-8")
    run, config = make_run(ROUTED, **{**OPTIONS, "force": True, "distill_steps": 2, "calibration": str(calibration)})
    export_run(run, config)
    if changed == "rows to distil on":
        calibration.write_text("".join([*lines[:-1], lines[-1].replace("fox", "dog")]), encoding="utf-8")
        assert calibration.stat().st_size == rows.stat().st_size
    elif changed == "rows to fold on":
        config.export.calibration_rows = 4
    else:
        config.export.distill_learning_rate = 0.02
    export_run(run, config)
    assert len(list(run.distilled.iterdir())) == 2


def test_a_close_fold_is_not_distilled(make_run) -> None:
    flat = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, temperature=1e-9, init_core_std=0.3)
    run, config = make_run(flat, kind="nf4", **OPTIONS)
    result = export_run(run, config)
    assert result["distillation"]["steps"] == 0
    assert not run.distilled.exists()
    assert result["fidelity"]["kl_mean"] < 1e-6


@pytest.mark.parametrize("mixture", [False, True])
def test_calibration_rows_of_a_deployment(make_run, tmp_path: Path, mixture: bool) -> None:
    rows = tmp_path / "deployment.jsonl"
    rows.write_text('{"instruction": "Say fox", "output": "fox"}\n' * 3)
    run, config = make_run(ROUTED, format="lora", fold="least_squares", calibration=str(rows))
    if mixture:
        config.data.path, config.data.sources = MISSING, {"a": SourceConfig(path=config.data.path)}
    result = export_run(run, config)
    assert result["calibration"] == {"rows": 3, "fold": "least_squares"}
