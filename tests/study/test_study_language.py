"""The instruction study on a tiny model: matched adapters, PEFT baselines, metrics by family."""

from __future__ import annotations

from qmemtune.cli.app import main
from qmemtune.rundir import read_json


def test_instructions_on_a_tiny_model(tiny_llama_dir, tmp_path):
    arguments = [
        f"model.path={tiny_llama_dir}", "model.compute_dtype=float32", "study.settings=[r2]", "study.seeds=[0, 1]",
        "study.variants=[lora, lora_larger, queryable, vera]", "trainer.max_steps=2", "data.max_train_rows=40",
        "data.max_eval_rows=24", "evaluation.exact_match.max_rows=4", "evaluation.exact_match.max_new_tokens=2",
        "vera:adapter.options={r: 4}", "queryable:adapter.num_atoms=2", "queryable:adapter.block_size=2",
        "trainer.per_device_train_batch_size=4", f"study_dir={tmp_path}", "--quiet",
    ]  # fmt: skip
    assert main(["study", "instructions", *arguments]) == 0
    study = read_json(tmp_path / "study.json")
    entries = {entry["variant"]: entry for entry in study["comparisons"]}
    assert list(entries) == ["lora", "lora_larger", "queryable", "vera"]
    for entry in entries.values():
        assert entry["metrics"]["loss"]["n"] == entry["metrics"]["exact_match"]["n"] == 2
        assert 0 <= entry["metrics"]["row_accuracy"]["mean"] <= 1
        assert len(entry["groups"]) > 1
    assert len({round(cell["base_loss"], 6) for cell in study["cells"]}) == 1
    assert entries["lora"]["parameters"] < entries["lora_larger"]["parameters"]
