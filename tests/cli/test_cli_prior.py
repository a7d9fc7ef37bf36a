"""A run whose instruction prior has a sentence encoder: moved, exported, asked with other instructions."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from qmemtune.cli.app import main


@pytest.fixture(scope="module")
def trained(tiny_llama_dir, make_encoder, tmp_path_factory):
    """A folder with the run ``run``, whose encoder has moved from ``encoder`` to ``moved``."""
    folder = tmp_path_factory.mktemp("prior")
    make_encoder(folder / "encoder", AutoTokenizer.from_pretrained(tiny_llama_dir))
    rows = [{"instruction": f"Name {i % 3}", "prompt": f"{i} ->", "completion": f" {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = [
        f"model.path={tiny_llama_dir}",
        f"data.path={folder / 'rows.jsonl'}",
        "data.eval_fraction=0.5",
        "adapter=queryable",
        "adapter.r=4",
        "adapter.instruction_prior=5",
        f"adapter.prior_encoder={folder / 'encoder'}",
        "optimizer.learning_rate=0.05",
        "trainer.max_steps=3",
        "evaluation.at_end=false",
    ]
    assert main(["train", *options, f"run_dir={folder / 'run'}", "--quiet"]) == 0
    shutil.move(folder / "encoder", folder / "moved")
    return folder


@pytest.fixture
def call(capsys):
    def run(*arguments: str, code: int = 0) -> dict:
        capsys.readouterr()
        found = main([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out)

    return run


def test_an_encoder_that_moved_is_given_anew(trained, call):
    run = f"run_dir={trained / 'run'}"
    error = call("eval", run, code=2)["error"]
    assert "does not exist" in error["problem"]
    assert "adapter.prior_encoder=" in error["fix"]
    own = call("eval", run, f"adapter.prior_encoder={trained / 'moved'}")
    other = call("eval", run, f"adapter.prior_encoder={trained / 'moved'}", "instruction=Name 1")
    none = call("eval", run, f"adapter.prior_encoder={trained / 'moved'}", "instruction=")
    losses = [report["tuned"]["loss"] for report in (own, other, none)]
    assert len(set(losses)) == 3
    assert {report["base"]["loss"] for report in (own, other, none)} == {own["base"]["loss"]}
    copied = shutil.copytree(trained / "run", trained / "whole")
    shutil.copytree(trained / "moved", copied / "adapter" / "encoder")
    assert call("eval", f"run_dir={copied}")["tuned"]["loss"] == own["tuned"]["loss"]
    error = call("eval", f"run_dir={copied}", "adapter.prior_encoder=./nowhere", code=2)["error"]
    assert "does not exist" in error["problem"]


def test_an_exported_adapter_names_its_encoder_and_finds_it_beside_its_weights(trained, call, tiny_llama_dir):
    moved = f"adapter.prior_encoder={trained / 'moved'}"
    out = trained / "export"
    call("merge-export", f"run_dir={trained / 'run'}", moved, "export.format=live", f"export.path={out}")
    for file in ("adapter_config.json", "qmemtune.json"):
        assert str(trained) not in (out / file).read_text(encoding="utf-8")
    measure = ["eval", f"export.path={out}", f"model.path={tiny_llama_dir}", f"data.path={trained / 'rows.jsonl'}"]
    error = call(*measure, code=2)["error"]
    assert "instruction encoder, encoder, is not found" in error["problem"]
    shutil.copytree(trained / "moved", out / "encoder")
    of_run = call("eval", f"run_dir={trained / 'run'}", moved)
    assert call(*measure)["tuned"]["loss"] == pytest.approx(of_run["tuned"]["loss"], abs=1e-5)


def test_other_options_of_a_finished_adapter_stay(trained, call):
    error = call("eval", f"run_dir={trained / 'run'}", "adapter.instruction_prior=1", code=2)["error"]
    assert "cannot be changed" in json.dumps(error)


def test_an_instruction_without_a_prior_is_refused(tmp_path, call, tiny_llama_dir):
    rows = [{"prompt": f"{i} ->", "completion": f" {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = [f"model.path={tiny_llama_dir}", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_fraction=0.5"]
    error = call("eval", *options, "instruction=Sort", code=2)["error"]
    assert "no effect on a bare model" in error["problem"]
    call("train", *options, f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1", "evaluation.at_end=false")
    error = call("eval", f"run_dir={tmp_path / 'run'}", "instruction=Sort", code=2)["error"]
    assert "no adapter with an instruction prior" in error["problem"]
