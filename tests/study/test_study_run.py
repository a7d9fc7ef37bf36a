"""A whole small study: results, resuming, tables, README, several processes."""

from __future__ import annotations

import json
import logging
import os
import warnings

import pytest
import torch

from qmemtune import quiet
from qmemtune.cli.app import main
from qmemtune.engine.shared import Loads
from qmemtune.engine.trainer import RunTrainer
from qmemtune.rundir import read_json
from qmemtune.study import cell as cells_run
from qmemtune.study.analysis import analyse, measured
from qmemtune.study.design import EXACT_MATCH, LOSS, ROW_ACCURACY
from qmemtune.study.options import read_request
from qmemtune.study.readme import BEGIN, END, section, update
from qmemtune.study.run import plan_study, worker_pool
from qmemtune.study.tables import grid_table, main_table, markdown, number

SMALL = [
    "data.regression.rows=64", "data.regression.heldout_rows=64", "model.mlp.width=8", "model.mlp.depth=2",
    "model.mlp.pretrain_steps=20", "trainer.max_steps=3", "trainer.per_device_train_batch_size=16",
    "study.seeds=[0, 1]", "study.settings=[ample]", "study.learning_rates=[0.001, 0.02]", "study.grid_seeds=[0]",
    "queryable:adapter.num_atoms=4", "queryable:adapter.r=2",
]  # fmt: skip


def run(tmp_path, *more):
    return main(["study", "regression", *SMALL, f"study_dir={tmp_path / 'study'}", *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory, session_cache):
    """A finished study's folder."""
    folder = tmp_path_factory.mktemp("whole")
    os.environ["QMEMTUNE_CACHE"] = str(session_cache)
    assert run(folder, "--quiet") == 0
    return folder / "study"


def test_a_study_writes_results_tables_and_plots(done):
    study = read_json(done / "study.json")
    assert {entry["variant"] for entry in study["comparisons"]} == {"lora", "queryable"}
    for entry in study["comparisons"]:
        assert entry["metrics"]["loss"]["n"] == 2
        assert entry["parameters"] > 0
    memory = next(e for e in study["comparisons"] if e["variant"] == "queryable")["metrics"]["loss"]["all"]
    assert memory["low"] < memory["value"] < memory["high"]
    assert {entry["variant"] for entry in study["stability"]} == {"lora", "queryable"}
    assert (done / "study.md").read_text() == markdown(study)
    assert {file.name for file in (done / "plots").iterdir()} == {"loss.png", "learning_rates_ample.png"}
    for cell in study["cells"]:
        assert cell["base_loss"] > 0
    assert not list(done.rglob("optimizer.pt"))


def test_variants_of_a_seed_meet_the_same_base_and_rows(done):
    found = read_json(done / "study.json")["cells"]
    for seed in (0, 1):
        assert len({cell["base_loss"] for cell in found if cell["seed"] == seed}) == 1
    assert len({cell["base_loss"] for cell in found}) == 2


def test_finished_cells_are_not_run_again_and_changed_ones_are(done, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(cells_run, "train", lambda composed, **_: ran.append(composed.config) or stop())

    def stop():
        raise RuntimeError("reached")

    assert run(done.parent, "--quiet") == 0
    assert ran == []
    assert run(done.parent, "--quiet", "lora:trainer.max_steps=4") == 1
    assert [config.adapter.kind for config in ran] == ["lora"]


def test_dry_run_lists_cells_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path, "--dry-run", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["cells"]
    assert len(listed) == 8
    assert all(cell["parameters"] > 0 and not cell["done"] for cell in listed)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_cell_goes_on_and_ends_like_a_whole_one(done, tmp_path, monkeypatch, capsys):
    steps = RunTrainer.end_step

    def end_step(self):
        steps(self)
        if self.state.global_step == 2:
            self._stopping = True

    only = ["study.variants=[queryable]", "study.seeds=[0]", "study.learning_rates=[]"]
    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "end_step", end_step)
        assert run(tmp_path, "--quiet", *only) > 128
    assert "give the same command again" in capsys.readouterr().err
    assert run(tmp_path, "--quiet", *only) == 0
    again = read_json(next((tmp_path / "study").rglob("result.json")))
    whole = read_json(done / "cells" / again["cell"] / "result.json")
    assert again["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_processes_side_by_side_find_the_same(done, tmp_path):
    assert run(tmp_path, "--quiet", "study.jobs=2") == 0
    numbers = [
        {name: cell["metrics"] for cell in read_json(folder / "study.json")["cells"] for name in [cell["digest"]]}
        for folder in (done, tmp_path / "study")
    ]
    assert numbers[0].keys() == numbers[1].keys()
    for digest, metrics in numbers[0].items():
        assert metrics["loss"] == pytest.approx(numbers[1][digest]["loss"], rel=1e-4)


@pytest.mark.parametrize("silenced", [True, False])
def test_processes_are_as_silent_as_the_one_that_starts_them(silenced, monkeypatch, capfd):
    monkeypatch.setattr(quiet, "_silenced", silenced)
    with worker_pool(1) as pool:
        # What runs cells is loaded after the process has been silenced: bitsandbytes speaks while it is imported.
        pool.submit(exec, "import qmemtune.study.run").result()
        warning = ("it is deprecated", FutureWarning, "modeling_utils.py", 1, "transformers.modeling_utils")
        pool.submit(warnings.warn_explicit, *warning).result()
        pool.submit(logging.getLogger("bitsandbytes.backends.cpu.ops").warning, "no module named kernels").result()
    told = capfd.readouterr().err
    assert (told == "") == silenced
    assert ("it is deprecated" in told) != silenced
    assert ("no module named kernels" in told) != silenced


def test_a_diverged_run_counts_as_its_base(tmp_path):
    assert run(tmp_path, "--quiet", "lora:optimizer.learning_rate=1e9", "study.learning_rates=[]", "study.seeds=[0]",
               "trainer.max_grad_norm=0") == 0  # fmt: skip
    lora = next(e for e in read_json(tmp_path / "study" / "study.json")["comparisons"] if e["variant"] == "lora")
    base = read_json(next((tmp_path / "study").rglob("result.json")))["base_loss"]
    assert lora["diverged"] == 1
    assert lora["metrics"]["loss"]["mean"] == pytest.approx(base, rel=1e-4)


def test_a_metric_that_no_run_has_is_left_out():
    runs = [{"metrics": {"loss": 1.0, "row_accuracy": 0.5}, "base_loss": 2.0}, {"metrics": {}, "base_loss": 2.0}]
    assert measured((LOSS, ROW_ACCURACY, EXACT_MATCH), runs) == [LOSS, ROW_ACCURACY]
    assert measured((LOSS, ROW_ACCURACY), []) == [LOSS]


@pytest.mark.parametrize("seeds", ["[1, 2]", "3-4"])
def test_tables_have_the_studys_own_learning_rate_whatever_seeds_the_grid_has(seeds):
    request = read_request(["study.settings=[ample]", f"study.seeds={seeds}", "study.grid_seeds=[0, 1]",
                            "study.learning_rates=[0.001, 0.1]"])  # fmt: skip
    plan, _ = plan_study("regression", request)
    own = {cell.variant: cell.learning_rate for cell in plan.cells if cell.seed == plan.seeds[-1]}
    results = [
        {
            "setting": cell.setting,
            "variant": cell.variant,
            "seed": cell.seed,
            "learning_rate": cell.learning_rate,
            "digest": cell.digest,
            "diverged": False,
            "base_loss": 1.0,
            "seconds": 1.0,
            "metrics": {"loss": cell.learning_rate},
        }
        for cell in plan.cells
    ]
    found = analyse(plan, results, [])
    assert {entry["variant"]: entry["learning_rate"] for entry in found["comparisons"]} == own
    for entry in found["comparisons"]:
        assert entry["metrics"]["loss"]["n"] == 2
        assert entry["metrics"]["loss"]["mean"] == pytest.approx(own[entry["variant"]])
        assert f"| {number(own[entry['variant']])} |" in main_table(found, "ample")


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        # One of the rates diverged on one seed, without a base's loss to count with.
        ({0: [None, 0.8, 0.4], 1: [0.9, 0.7, 0.5]}, 0.1),
        ({0: [None, 0.85, 0.45], 1: [None, 0.85, 0.45]}, 0.1),
        ({0: [0.3, 0.85, None], 1: [0.5, None, 0.8]}, 0.001),
        ({0: [None, None, None], 1: [None, None, None]}, None),
    ],
)
def test_a_grid_has_each_loss_at_its_own_rate(losses, best):
    request = read_request(["study.settings=[ample]", "study.seeds=[5]", "study.grid_seeds=[0, 1]",
                            "study.learning_rates=[0.001, 0.01, 0.1]"])  # fmt: skip
    plan, _ = plan_study("regression", request)

    def result(cell):
        loss = 1.0 if cell.seed == 5 else losses[cell.seed][plan.learning_rates.index(cell.learning_rate)]
        facts = {name: getattr(cell, name) for name in ("setting", "variant", "seed", "learning_rate", "digest")}
        return {**facts, "diverged": loss is None, "base_loss": None, "seconds": 1.0, "metrics": {"loss": loss}}

    found = analyse(plan, [result(cell) for cell in plan.cells], [])
    assert [entry["best_learning_rate"] for entry in found["stability"]] == ([] if best is None else [best, best])
    for entry in found["stability"]:
        of_rate = entry["loss_by_learning_rate"][plan.learning_rates.index(best)]
        assert of_rate == entry["best_loss"] == min(v for v in entry["loss_by_learning_rate"] if v is not None)
    assert grid_table(found)


def test_the_readme_section_is_made_of_the_stored_results(done, tmp_path):
    stored, readme = tmp_path / "stored", tmp_path / "README.md"
    stored.mkdir()
    (stored / "regression.json").write_bytes((done / "study.json").read_bytes())
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert update(readme, stored)
    assert not update(readme, stored)
    assert readme.read_text() == f"before\n{section(stored)}\nafter\n"
    assert "Noisy regression" in readme.read_text()


def test_results_of_other_variants_are_kept_beside_after_the_name_of_their_folder(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = tmp_path / "benchmarks" / "studies"
    stored.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    (stored / "regression.json").write_bytes((done / "study.json").read_bytes())
    (tmp_path / "methods").symlink_to(done)
    assert main(["study", "regression", "--readme", f"study_dir={tmp_path / 'methods'}"]) == 0
    assert {file.name for file in stored.iterdir()} == {"regression.json", "methods.json"}
    assert (tmp_path / "README.md").read_text().count("<b>Noisy regression: lora, queryable (ample)</b>") == 2


def test_what_a_run_does_to_its_base_reaches_no_other():
    loads = Loads(keep=True)
    first = loads.own_copy("base", 1, lambda: torch.nn.Linear(2, 2))
    weight = first.weight.detach().clone()
    first.weight.data.zero_()
    assert torch.equal(loads.own_copy("base", 1, lambda: torch.nn.Linear(2, 2)).weight, weight)
    assert not torch.equal(loads.own_copy("base", 2, lambda: torch.nn.Linear(2, 2)).weight, weight)
