"""The bridge to lm-evaluation-harness: tasks from a local folder, and the mistakes a user can make."""

from __future__ import annotations

import builtins
import importlib.util
import json

import pytest
import torch

from qmemtune.config.evaluation import EvaluationConfig
from qmemtune.errors import UserError
from qmemtune.evaluation.harness import find_tasks, run_tasks
from qmemtune.evaluation.verb import measure

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
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
def test_a_task_is_known_by_its_name_or_by_the_path_of_its_folder(task_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="hellaswagg") as error:
        find_tasks(["hellaswagg"])
    assert "hellaswag" in str(error.value.findings[0].fix)
    monkeypatch.chdir(tmp_path)
    # A folder of rows beside the run.
    (tmp_path / "gsm8k").mkdir()
    assert find_tasks(["gsm8k"])[0] == ["gsm8k"]
    assert find_tasks(["tasks"])[0] == find_tasks(["./tasks"])[0] == ["tiny_capitals"]
    with pytest.raises(UserError, match="holds no harness task"):
        find_tasks(["./gsm8k"])
    with pytest.raises(UserError, match="no such folder"):
        find_tasks(["./nowhere"])


@needs_harness
def test_tasks_are_looked_up_before_anything_is_measured(llama, tokenizer, rows, tmp_path):
    news = []
    options = EvaluationConfig(tasks=[str(tmp_path)])
    with pytest.raises(UserError, match="holds no harness task"):
        measure(llama, tokenizer, rows, options, progress=lambda *facts: news.append(facts), **CPU)
    assert news == []


@needs_harness
def test_what_was_measured_stays_when_the_harness_fails(llama, tokenizer, rows, task_folder, tmp_path):
    (tmp_path / "capitals.jsonl").unlink()
    options = EvaluationConfig(tasks=[str(task_folder)])
    found = measure(llama, tokenizer, rows, options, **CPU).as_dict()
    assert found["loss"] > 0
    assert "capitals.jsonl" in found["tasks"][str(task_folder)]["error"]


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
