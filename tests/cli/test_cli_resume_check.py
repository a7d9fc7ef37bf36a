"""`resume-check` replays a run's steps, finds what differs, and leaves the run as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qmemtune.cli.app import main
from qmemtune.engine import manifest


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder with its digest and the time of its last change."""
    return {
        str(f.relative_to(folder)): f"{hashlib.sha256(f.read_bytes()).hexdigest()} {f.stat().st_mtime_ns}"
        for f in folder.rglob("*")
        if f.is_file()
    }


@pytest.fixture
def check(capsys):
    def call(*arguments: object, code: int) -> dict:
        capsys.readouterr()
        found = main(["resume-check", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out or "{}")

    return call


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints of 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("checked")
    rows = [{"prompt": f"say {'a ' * (i % 5)}{i} ->", "completion": f" {i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"model.path={tiny_llama_dir}", f"data.path={folder / 'rows.jsonl'}", "data.eval_fraction=0.2"]
    options += ["adapter=queryable", "adapter.r=2", "adapter.num_atoms=2", "adapter.key_dim=2", "adapter.dropout=0.1"]
    options += ["trainer.per_device_train_batch_size=2", "trainer.max_steps=6", "trainer.logging_steps=1"]
    options += ["trainer.save_steps=2", "trainer.save_total_limit=9", "evaluation.every_steps=2"]
    assert main(["train", *options, f"run_dir={folder / 'run'}", "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_found_exact_and_left_alone(trained, check):
    before = tree(trained)
    report = check(trained, code=0)
    assert report["exact"] is True
    assert (report["from_step"], report["to_step"]) == (4, 6)
    compared = report["compared"]
    assert (compared["losses"], compared["grad_norms"]) == (2, 2)
    assert compared["evaluations"] >= 1
    assert "adapter_model.safetensors" in compared["files"]
    assert tree(trained) == before


def test_other_numbers_and_other_weights_are_found(run, check):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    at = next(line for line in lines if line["event"] == "train" and line["step"] == 5)
    at["grad_norm"] *= 1 + 1e-6
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Weights that are whole by their manifest, and not those of this training.
    last = run / "checkpoints" / "checkpoint-6"
    weights = load_file(last / "adapter_model.safetensors")
    first = next(iter(weights))
    weights[first] = weights[first] + 1e-3
    save_file(weights, last / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = json.loads((last / "manifest.json").read_text())
    file = last / "adapter_model.safetensors"
    facts["files"][file.name] = {"size": file.stat().st_size, "sha256": manifest.sha256(file)}
    facts["digest"] = manifest.digest({key: value for key, value in facts.items() if key != "digest"})
    (last / "manifest.json").write_text(json.dumps(facts))
    report = check(run, code=1)
    assert report["exact"] is False
    assert len(report["differences"]) == 2
    assert report["differences"][0].startswith("step 5, train: grad_norm is")
    assert report["differences"][1] == "step 6: adapter_model.safetensors is another"


def test_a_run_with_its_last_checkpoint_only_is_replayed_from_the_beginning(run, check):
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    report = check(run, code=0)
    assert (report["from_step"], report["own_checkpoint_step"], report["to_step"]) == (0, 3, 6)
    assert report["compared"]["losses"] == 6
    assert report["compared"]["files"]


def test_a_change_since_is_said(run, check):
    report = check(run, "trainer.max_grad_norm=0.001", "--steps", 2, code=1)
    assert any("trainer.max_grad_norm was 1.0 and is 0.001" in line for line in report["changes"])
    assert any("adapter_model.safetensors" in line for line in report["differences"])


def test_a_run_without_anything_to_compare_is_an_error(run, check):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text("")
    assert "no log and no checkpoint" in check(run, code=2)["error"]["problem"]


def test_what_is_logged_beside_training_is_not_compared(run, check):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 5)
    message = "warning: the tracking back-end tensorboard failed and is switched off"
    lines.insert(at, json.dumps({"event": "warning", "step": 5, "message": message}) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    report = check(run, code=0)
    assert report["exact"] is True
    assert report["compared"]["losses"] == 2
