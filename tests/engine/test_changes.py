"""A resume says what changed since the checkpoint, and needs a word where the run would not end as it began."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmemtune.engine import made_with
from qmemtune.engine.made_with import ChangedRun
from qmemtune.engine.manifest import digest
from qmemtune.engine.plan import plan
from qmemtune.engine.resume_check import compare_lines
from qmemtune.engine.run import train
from qmemtune.errors import UserError

LONG = ("trainer.max_steps=4", "trainer.save_steps=2", "evaluation.at_end=false", "trainer.save_total_limit=9")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def halfway(kept: Path, composed, tmp_path: Path, rows_file: Path):
    """Plans to go on from step 2 of a run of 4; gives what is told."""
    if not kept.exists():
        shutil.copy(rows_file, kept.parent / "rows.jsonl")
        train(composed(*LONG, f"data.path={kept.parent / 'rows.jsonl'}"))
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
        shutil.copytree(tmp_path / "run", kept)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(kept, tmp_path / "run")

    def go_on(*overrides: str, rows: Path = kept.parent / "rows.jsonl") -> list[str]:
        found = plan(composed(*LONG, f"data.path={rows}", "resume=auto", *overrides))
        return [line for line in found["warnings"] if "since checkpoint-2" in line]

    return go_on


def test_nothing_changed_nothing_is_said(halfway):
    assert halfway() == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate was 0.01 and is 0.02"),
        ("optimizer.schedule=linear", 'optimizer.schedule was "cosine" and is "linear"'),
        ("trainer.max_steps=9", "trainer.max_steps was 4 and is 9"),
        ("trainer.length_grouping=true", "trainer.length_grouping was false and is true"),
        ("trainer.padding_free=false", "trainer.padding_free was true and is false"),
        ("trainer.max_grad_norm=0", "trainer.max_grad_norm was 1.0 and is 0.0"),
        ("seed=7", "seed was 0 and is 7"),
        ("quantization=nf4", 'quantization.kind was "none" and is "nf4"'),
        ("data.max_length=40", "the training rows are others"),
        ("data.eval_fraction=0.3", "data.eval_fraction was 0.2 and is 0.3"),
        ("model.compute_dtype=bfloat16", "the arithmetic was in float32 and is in bfloat16"),
    ],
)
def test_a_change_that_matters_needs_a_word(halfway, override, words):
    with pytest.raises(ChangedRun) as error:
        halfway(override)
    assert words in str(error.value)
    assert "resume.allow_changes=true" in str(error.value)
    told = halfway(override, "resume.allow_changes=true")
    assert any(line.startswith("warning") and words in line for line in told)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.save_steps=3", "trainer.save_steps was 2 and is 3"),
        ("trainer.logging_steps=1", "trainer.logging_steps was 2 and is 1"),
        ("evaluation.every_steps=2", "evaluation.every_steps was not set and is 2"),
        ("data.max_length=512", "data.max_length was 1024 and is 512"),
        ("tracking.name=other", 'tracking.name was not set and is "other"'),
    ],
)
def test_a_change_that_does_not_matter_is_only_said(halfway, override, words):
    assert halfway(override) == [f"since checkpoint-2 {words}"]


def test_a_changed_data_file_is_named(halfway, kept, tmp_path):
    rows, moved = kept.parent / "rows.jsonl", tmp_path / "moved.jsonl"
    lines = rows.read_text().splitlines()
    moved.write_text("\n".join(lines) + "\n")
    assert [line.partition(" and is ")[0] for line in halfway(rows=moved)] == [
        f'since checkpoint-2 data.path was "{rows}"'
    ]
    before = rows.read_text()
    rows.write_text(before.replace("piano", "organ"))
    try:
        with pytest.raises(ChangedRun) as error:
            halfway()
        assert f"the data file {rows} was written again" in str(error.value)
        rows.write_text("\n".join(lines[1:]) + "\n")
        with pytest.raises(ChangedRun, match=r"had [\d,]+ bytes and has [\d,]+"):
            halfway()
    finally:
        rows.write_text(before)
    # The same rows, written again.
    assert halfway() == []


@pytest.fixture
def own_base(tiny_llama_dir, tmp_path):
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))


def stopped_on(base, composed, tmp_path):
    """Stops a run of 4 steps after 2; gives what plans to go on from there."""
    options = (*LONG, f"model.path={base}")
    train(composed(*options), until=2)

    def go_on(*overrides):
        found = plan(composed(*options, f"run_dir={tmp_path / 'run'}", "resume=auto", *overrides))
        return [line for line in found["warnings"] if "since checkpoint-2" in line]

    return go_on


def test_a_base_whose_weights_change_in_place_is_named(composed, own_base, tmp_path):
    go_on, file = stopped_on(own_base, composed, tmp_path), own_base / "model.safetensors"
    tensors = load_file(file)
    # Written again, and with the same values: nothing to say.
    save_file(tensors, file, {"format": "pt"})
    assert go_on() == []
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, file, {"format": "pt"})
    words = f"the weights of the base model {own_base} are others"
    with pytest.raises(ChangedRun, match=re.escape(words)) as error:
        go_on()
    assert "resume.allow_changes=true" in str(error.value)
    assert go_on("resume.allow_changes=true") == [
        f"warning: since checkpoint-2 {words}: the run ends otherwise than it would have"
    ]
    train(composed(*LONG, f"model.path={own_base}", "resume=auto", "resume.allow_changes=true"))


def test_a_base_whose_config_changes_in_place_is_named(composed, own_base, tmp_path):
    go_on, file = stopped_on(own_base, composed, tmp_path), own_base / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert go_on() == []
    file.write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    with pytest.raises(ChangedRun, match=re.escape(f"the config of the base model {own_base} is another")):
        go_on()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_hidden_layers": 3, "layer_types": None}, "it has weights for 4 layers, and the model's adapter is in 3"),
        ({"intermediate_size": 48}, "mlp.down_proj.lora_A.weight has the shape [4, 64], and [4, 48] in the model"),
    ],
)
def test_a_base_of_another_shape_is_refused_whatever_is_allowed(composed, own_base, tmp_path, other, words):
    go_on, file = stopped_on(own_base, composed, tmp_path), own_base / "config.json"
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    file.write_text(json.dumps({**json.loads(file.read_text()), **other}))
    with pytest.raises(UserError, match=re.escape(words)) as error:
        go_on("resume.allow_changes=true")
    assert error.value.exit_code == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_does_not_know_its_base_goes_on(halfway, monkeypatch):
    real = made_with.read_json
    monkeypatch.setattr(
        made_with, "read_json", lambda file: {name: value for name, value in real(file).items() if name != "base"}
    )
    assert halfway() == []


def test_another_number_of_threads_is_only_said(halfway, monkeypatch):
    threads = made_with.torch.get_num_threads()
    monkeypatch.setattr(made_with.torch, "get_num_threads", lambda: threads + 3)
    assert halfway() == [
        f"since checkpoint-2 the number of threads was {threads} and is {threads + 3} "
        "(the result may differ in its last bits)"
    ]


def test_another_version_is_named(halfway, monkeypatch):
    real = made_with.version_of
    monkeypatch.setattr(made_with, "version_of", lambda name: "9.9" if name == "torch" else real(name))
    with pytest.raises(ChangedRun, match=r"torch was .* and is 9\.9"):
        halfway()
    assert "is 9.9" in halfway("resume.allow_changes=true")[0]
    monkeypatch.setattr(
        made_with, "version_of", lambda name: "9.9" if name in ("tokenizers", "datasets") else real(name)
    )
    assert len(halfway()) == 2
    assert not any(line.startswith("warning") for line in halfway())


def test_a_constant_schedule_may_go_on_for_longer(composed, adapter_bytes):
    options = ("optimizer.schedule=constant", "evaluation.at_end=false")
    whole = train(composed(*options, "trainer.max_steps=3", run="whole"))
    train(composed(*options, "trainer.max_steps=2", run="longer"))
    longer = train(composed(*options, "trainer.max_steps=3", "resume=auto", run="longer"))
    assert adapter_bytes(Path(longer["adapter"])) == adapter_bytes(Path(whole["adapter"]))


def test_an_allowed_change_is_part_of_the_next_checkpoint(halfway, composed, kept, tmp_path):
    changed = ("optimizer.learning_rate=0.02", f"data.path={kept.parent / 'rows.jsonl'}")
    train(composed(*LONG, *changed, "resume=auto", "resume.allow_changes=true"))
    stored = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / made_with.FILE).read_text())
    assert stored["config"]["optimizer.learning_rate"] == 0.02
    # How a run was gone on with is no part of it.
    assert "path: null\n  allow_changes: false" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(halfway, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    facts = json.loads((path / "manifest.json").read_text())
    del facts["digest"]
    facts |= {"format": 99, "qmemtune": "77.0"}
    (path / "manifest.json").write_text(json.dumps({**facts, "digest": digest(facts)}))
    with pytest.raises(UserError, match=r"format 99.*upgrade qmemtune to 77\.0"):
        halfway()


OPTIMIZER = (
    "optimizer.learning_rate=0.02", "optimizer.weight_decay=0.5", "optimizer.betas=[0.5,0.9]", "optimizer.eps=0.1",
    "adapter.memory_learning_rate_multiplier=2", "adapter.core_weight_decay=0.5",
)  # fmt: skip
STEPWISE = (*LONG, "trainer.logging_steps=1", "optimizer.warmup_steps=1")
ALLOWED = ("resume=auto", "resume.allow_changes=true")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run that was stopped after its second step is kept, and how it ends undisturbed."""
    return tmp_path_factory.mktemp("stopped")


@pytest.mark.parametrize("override", OPTIMIZER)
def test_a_changed_optimizer_setting_is_that_of_the_next_step(stopped, composed, adapter_bytes, tmp_path, override):
    if not (stopped / "whole").exists():
        train(composed(*STEPWISE, adapter="queryable"), until=2)
        shutil.copytree(tmp_path / "run", stopped / "run")
        summary = train(composed(*STEPWISE, "resume=auto", adapter="queryable"))
        shutil.copytree(summary["adapter"], stopped / "whole")
        shutil.rmtree(tmp_path / "run")
    shutil.copytree(stopped / "run", tmp_path / "run")
    summary = train(composed(*STEPWISE, override, *ALLOWED, adapter="queryable"))
    assert adapter_bytes(Path(summary["adapter"])) != adapter_bytes(stopped / "whole")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_a_run_whose_optimizer_changed_goes_on_as_one_that_began_so(
    composed, adapter_bytes, read_lines, tmp_path, name
):
    first = (*STEPWISE, f"optimizer.name={name}")
    begun_so = (*first, *OPTIMIZER)
    train(composed(*begun_so, adapter="queryable", run="whole"))
    train(composed(*first, adapter="queryable"), until=2)
    train(composed(*begun_so, *ALLOWED, adapter="queryable"), until=3)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    train(composed(*begun_so, *ALLOWED, adapter="queryable", run="again"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    train(composed(*begun_so, *ALLOWED, adapter="queryable"))
    whole, run, again = (tmp_path / folder for folder in ("whole", "run", "again"))

    def stored(folder: Path, file: str):
        return torch.load(folder / "checkpoints" / "checkpoint-4" / file, weights_only=True)

    assert stored(run, "optimizer.pt")["param_groups"] == stored(whole, "optimizer.pt")["param_groups"]
    assert stored(run, "scheduler.pt") == stored(whole, "scheduler.pt")
    rates = [
        [line["learning_rate"] for line in read_lines(folder / "metrics.jsonl") if line["event"] == "train"]
        for folder in (whole, run)
    ]
    assert rates[0][2:] == rates[1][2:]
    assert rates[0][:2] != rates[1][:2]
    # Stopped once more, and not.
    assert adapter_bytes(again / "adapter") == adapter_bytes(run / "adapter")


def test_another_optimizer_is_refused_whatever_is_allowed(halfway):
    with pytest.raises(ChangedRun, match=r'optimizer\.name was "adamw" and is "sgd"') as error:
        halfway("optimizer.name=sgd", "resume.allow_changes=true")
    assert error.value.exit_code == 2
    assert error.value.findings[0].fix == "give optimizer.name=adamw as before, or start a new run"


def test_a_paged_optimizer_goes_on_from_one_that_is_not(composed):
    train(composed(*LONG, "optimizer.name=adamw_8bit"), until=2)
    assert train(composed(*LONG, "optimizer.name=paged_adamw_8bit", *ALLOWED))["steps"] == 4


def test_a_form_that_was_found_out_is_no_change(composed):
    rows = {"training rows": "a"}
    config = composed("adapter=lora")
    then = {"rows": rows, "config": {"data.format": "auto"}, "steps": 3}
    now = {"rows": rows, "config": {"data.format": "alpaca"}, "steps": 3}
    assert made_with.config_changes(then, now, config) == []
    changed = made_with.config_changes(then, now | {"rows": {"training rows": "b"}}, config)
    assert [change.breaks for change in changed] == [True]


def test_numbers_that_an_earlier_version_did_not_log_are_not_compared():
    line = {"step": 4, "event": "evaluation", "loss": 1.0, "groups": {"a": {"loss": 2.0}}}
    more = {**line, "cut": 0, "groups": {"a": {"loss": 2.0, "cut": 0}}}
    assert compare_lines([line], [more]) == []
    for other in ({**more, "loss": 1.5}, {**more, "groups": {"a": {"loss": 2.5}}}, {**more, "groups": {}}):
        assert len(compare_lines([line], [other])) == 1
