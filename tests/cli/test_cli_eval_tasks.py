"""Tasks of the harness in ``eval``: what was measured is kept when they fail."""

from __future__ import annotations

import json

import pytest

from qmemtune.cli.app import main

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: [a, b]
doc_to_target: t
"""


def test_what_was_measured_is_kept_when_the_harness_fails(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [f"model.path={tiny_llama_dir}", "data.path=rows.jsonl", "trainer.max_steps=1", "run_dir=r", "adapter=lora"]
    assert main(["train", *train, "--quiet"]) == 0
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "t.yaml").write_text(TASK)
    capsys.readouterr()
    assert main(["eval", "r", "evaluation.tasks=[./e]", "--json", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "error" in json.loads(out)["tuned"]["tasks"]["./e"]
    assert json.loads((tmp_path / "r" / "eval.json").read_text())["base"]["loss"]
    assert err.startswith("error: evaluation.tasks: ./e: FileNotFound"), err
