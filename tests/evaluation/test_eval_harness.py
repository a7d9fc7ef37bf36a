"""The bridge to lm-evaluation-harness: tasks from a local folder, and the mistakes a user can make."""

from __future__ import annotations

import builtins
import importlib.util
import json

import pytest
import torch

from qmemtune.errors import UserError
from qmemtune.evaluation.harness import run_tasks

installed = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not installed, reason="lm-eval is not installed (the extra `eval`)")

TASK = """
task: tiny_capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["Paris", "Rome"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "capitals.jsonl"
    documents = [{"question": f"{i}. The capital of France is", "answer": i % 2} for i in range(6)]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.yaml").write_text(TASK.format(data=data))
    return folder


@needs_harness
def test_tasks_of_a_folder_run_offline_and_leave_the_model(llama, tokenizer, task_folder):
    llama.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = run_tasks(llama, tokenizer, [str(task_folder)], limit=4, batch_size=2)
    assert set(found) == {"tiny_capitals"}
    assert 0.0 <= found["tiny_capitals"]["acc"] <= 1.0
    assert found["tiny_capitals"]["n"] == 4
    assert llama.training
    assert torch.equal(torch.get_rng_state(), state)


@needs_harness
def test_unknown_tasks_are_named(llama, tokenizer, tmp_path):
    with pytest.raises(UserError, match="hellaswagg") as error:
        run_tasks(llama, tokenizer, ["hellaswagg"])
    assert "hellaswag" in str(error.value.findings[0].fix)
    with pytest.raises(UserError, match="holds no harness task"):
        run_tasks(llama, tokenizer, [str(tmp_path)])


def test_a_missing_harness_says_how_to_get_it(llama, tokenizer, monkeypatch):
    real = builtins.__import__

    def without_harness(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_harness)
    with pytest.raises(UserError) as error:
        run_tasks(llama, tokenizer, ["hellaswag"])
    assert "qmemtune[eval]" in error.value.findings[0].fix
