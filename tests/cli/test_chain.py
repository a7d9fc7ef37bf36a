"""The chain that users run, through the command line on a tiny model: train, eval, merge-export, eval of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmemtune.cli.app import main

ANSWERS = ["red", "green", "blue", "white", "black"]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"colour {i}:", "completion": f" {ANSWERS[i % 5]}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")

    def run(*arguments: str, code: int = 0) -> dict:
        assert main([*arguments, "--json"]) == code
        # Exactly one JSON object, and nothing else, is on stdout.
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_train_evaluate_export(call, tiny_llama_dir: Path, adapter: str) -> None:
    recipe = [
        f"model.path={tiny_llama_dir}",
        # What is compared is the models, not how bfloat16 rounds where the processor is fast at it.
        "model.compute_dtype=float32",
        "data.path=rows.jsonl",
        "data.eval_fraction=0.2",
        "quantization=nf4",
        f"adapter={adapter}",
        "adapter.r=4",
        "trainer.max_steps=3",
        "evaluation.exact_match.enabled=true",
        "evaluation.exact_match.max_new_tokens=4",
        "run_dir=one",
    ]
    trained = call("train", *recipe)
    assert {"run_dir", "steps", "train_loss", "eval", "trainable_parameters", "tokens_per_s"} <= trained.keys()
    assert {"step_s_median", "first_step_done_s", "peak_rss_mib"} <= trained.keys()
    assert {"loss", "perplexity", "exact_match"} <= trained["eval"].keys()
    assert trained["steps"] == 3

    error = call("train", *recipe, code=2)["error"]
    assert error.keys() >= {"problem", "where", "fix"}

    evaluated = call("eval", "run_dir=one")
    assert evaluated["tuned"]["loss"] == pytest.approx(trained["eval"]["loss"], abs=1e-6)
    assert {"loss", "perplexity", "exact_match"} <= evaluated["base"].keys()

    for form in ("merged", "lora", "live"):
        # Left to itself a merge takes the base that loses less: rounding decides which, of a tiny one.
        base = ["export.base=dequantized"] if form == "merged" else []
        exported = call("merge-export", "run_dir=one", f"export.format={form}", f"export.path={form}", *base)
        assert exported["exact"] is (adapter == "lora" or form == "live")
        assert {"loss_live", "loss_exported", "kl_mean", "rows"} <= exported["fidelity"].keys()
        if exported["exact"]:
            assert exported["fidelity"]["kl_mean"] < 1e-5
        again = call("eval", f"export.path={form}", f"model.path={tiny_llama_dir}")
        assert again["rows"] == evaluated["rows"]
        assert again["base"]["loss"] == pytest.approx(evaluated["base"]["loss"], abs=1e-5)
        if exported["exact"]:
            assert again["tuned"]["loss"] == pytest.approx(evaluated["tuned"]["loss"], abs=1e-4)

    answered = call("generate", "run_dir=one", "--prompt", "colour 3:", "--max-new-tokens", "3")
    assert answered


def test_an_exported_folder_is_measured_by_its_own_settings(call, tiny_llama_dir: Path) -> None:
    call("train", f"model.path={tiny_llama_dir}", "data.path=rows.jsonl", "trainer.max_steps=3", "run_dir=two")
    call("merge-export", "run_dir=two", "export.path=out", "export.format=merged")
    found = call("eval", "model.path=out", "data.path=rows.jsonl")
    assert found["tuned"]["loss"] > 0
    # A local base is not in the marker by its place, so it cannot be measured without being named.
    assert found["base"] is None


def test_empty_data_is_an_error(call, tiny_llama_dir: Path) -> None:
    Path("empty.jsonl").write_text("", encoding="utf-8")
    error = call("train", f"model.path={tiny_llama_dir}", "data.path=empty.jsonl", "run_dir=three", code=2)["error"]
    assert "empty.jsonl" in (error["where"] or "") + error["problem"]
