"""Evaluations during training leave no trace in what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmemtune.engine.run import train

EVALUATED = (
    "evaluation.every_steps=2",
    "evaluation.exact_match.enabled=true",
    "evaluation.exact_match.every_steps=3",
    "evaluation.exact_match.max_new_tokens=3",
    "evaluation.samples.every_steps=2",
    "evaluation.samples.max_new_tokens=3",
)


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_a_run_with_evaluations_ends_as_one_without(composed, adapter_bytes, read_lines, adapter):
    common = (
        "quantization=nf4",
        "adapter.dropout=0.2",
        "trainer.max_steps=6",
        "trainer.gradient_accumulation_steps=2",
        "trainer.gradient_checkpointing=true",
    )
    plain = train(composed(*common, "evaluation.at_end=false", adapter=adapter, run="plain"))
    evaluated = train(composed(*common, *EVALUATED, adapter=adapter, run="evaluated"))
    lines = read_lines(Path(evaluated["run_dir"]) / "metrics.jsonl")
    measured = {line["step"]: line for line in lines if line["event"] == "evaluation"}
    assert sorted(measured) == [2, 3, 4, 6]
    assert "exact_match" in measured[3]
    assert "exact_match" not in measured[2]
    assert "exact_match" in evaluated["eval"]
    assert adapter_bytes(Path(evaluated["adapter"])) == adapter_bytes(Path(plain["adapter"]))
