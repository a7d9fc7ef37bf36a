"""``inspect`` on a tiny run with an instruction prior; what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qmemtune.cli.app import main
from qmemtune.config.compose import compose
from qmemtune.config.dump import to_yaml

TASKS = {"reverse": ["Reverse it", "Turn it round"], "sort": ["Sort it", "Put it in order"]}


@pytest.fixture(scope="module")
def run_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    rows = [
        {"instruction": wordings[i % 2], "input": f"{i} a b", "output": f"b a {i}", "task": task}
        for i in range(20)
        for task, wordings in TASKS.items()
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = [
        f"model.path={tiny_llama_dir}",
        f"data.path={folder / 'rows.jsonl'}",
        "data.group_by=task",
        "data.eval_fraction=0.5",
        "adapter=queryable",
        "adapter.r=4",
        "adapter.num_atoms=6",
        "adapter.block_size=2",
        "adapter.instruction_prior=2",
        "trainer.max_steps=2",
        "evaluation.at_end=false",
    ]
    assert main(["train", *options, f"run_dir={folder / 'run'}", "--quiet"]) == 0
    return folder / "run"


def test_what_is_reported(run_dir, capsys):
    assert main(["inspect", str(run_dir), "--json", "--rows", "12"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((run_dir / "inspect.json").read_text(encoding="utf-8"))
    assert (run_dir / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert report["rows"] == 12
    assert [block["layers"] for block in report["blocks"]] == [["0", "1"], ["2", "3"]]
    for block in report["blocks"]:
        assert sum(block["use"]) == pytest.approx(1, abs=1e-5)
        assert 0 <= block["entropy"] <= 1
    assert [atom["atom"] for atom in report["atoms"]] == list(range(6))
    assert set(report["groups"]) == set(TASKS)
    assert {"with_prior", "without_prior"} == set(report["clustering"]) == set(report["instructions"])
    assert report["instructions"]["with_prior"]["wordings"]
    # All that differs between the two is the prior of the instructions, and it tells them apart.
    information = {kind: found["mutual_information"] for kind, found in report["clustering"].items()}
    assert information["with_prior"] > information["without_prior"]


def test_it_is_a_table_on_the_terminal_and_needs_no_matplotlib(run_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (run_dir / "inspect.png").unlink(missing_ok=True)
    assert main(["inspect", f"run_dir={run_dir}", "--rows", "8"]) == 0
    out, err = capsys.readouterr()
    assert "pip install 'qmemtune[report]'" in err
    assert not (run_dir / "inspect.png").exists()
    for words in ("sharpest routes", "mutual information", "core norm", "dead atoms"):
        assert words in out


def test_a_lora_run_is_refused(tmp_path, capsys, tiny_llama_dir):
    config = compose([f"model.path={tiny_llama_dir}", "data.path=generated:word_lists", "adapter=lora"]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "adapter is lora, which has no memory" in capsys.readouterr().err


def test_generated_cores_are_refused(tmp_path, capsys, tiny_llama_dir):
    options = [f"model.path={tiny_llama_dir}", "data.path=generated:word_lists", "adapter=queryable"]
    config = compose([*options, "adapter.generated_core=true"]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no routes to look at" in capsys.readouterr().err


def test_sets_of_rows_are_groups(run_dir, capsys):
    rows = run_dir.parent / "rows.jsonl"
    sources = [f"data.sources.{name}.path={rows}" for name in ("one", "two")]
    assert main(["inspect", str(run_dir), "--rows", "8", "~data.path", "data.group_by=null", *sources, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["group_by"] == "data.sources"
    assert set(report["groups"]) == {"one", "two"}


@pytest.mark.parametrize("mark", ["", "+"])
def test_one_run_at_a_time(tmp_path, capsys, mark):
    assert main(["inspect", str(tmp_path), f"{mark}run_dir={tmp_path / 'other'}"]) == 2
    assert "2 runs are named" in capsys.readouterr().err
    # The same one twice is one.
    assert main(["inspect", str(tmp_path), f"{mark}run_dir={tmp_path}/"]) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["{}", "run_dir={}", "+run_dir={}"])
def test_a_run_in_a_folder_with_any_name(tmp_path, capsys, tiny_llama_dir, form):
    folder = tmp_path / "runs" / "lr=1e-3"
    folder.mkdir(parents=True)
    config = compose([f"model.path={tiny_llama_dir}", "data.path=generated:word_lists", "adapter=lora"]).config
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["inspect", form.format(folder)]) == 2
    assert f"{folder}: the run's adapter is lora" in capsys.readouterr().err
