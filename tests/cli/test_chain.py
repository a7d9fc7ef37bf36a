"""The chain that users run, through the command line on a tiny model: train, eval, merge-export, eval of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qmemtune.cli.app import main
from qmemtune.cli.evaluate import doubts
from qmemtune.export.opening import open_exported

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


def test_an_export_and_its_base_answer_as_they_were_trained(call, tiny_llama_dir: Path, tmp_path: Path, capsys) -> None:
    words = [{"instruction": f"Say {word}", "output": word} for word in ANSWERS * 8]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(json.dumps(row) for row in words), encoding="utf-8")
    steps = ["model.compute_dtype=float32", "data.path=alpaca.jsonl", "trainer.max_steps=3", "adapter=queryable"]
    call("train", f"model.path={tiny_llama_dir}", *steps, "run_dir=one")
    ask = ["--prompt", "Say red", "--max-new-tokens", "4"]
    live = call("generate", "one", *ask)["answers"]
    exports = {}
    for form in ("live", "merged"):
        call("merge-export", "one", f"export.format={form}", f"export.path={form}")
        # As somebody else finds it: the rows are not there, which would show how a prompt is rendered.
        exports[form] = tmp_path / "elsewhere" / form
        exports[form].parent.mkdir(exist_ok=True)
        (tmp_path / form).rename(exports[form])
    (tmp_path / "alpaca.jsonl").unlink()
    assert open_exported(exports["merged"], [], needs_data=False).config.data.format == "alpaca"
    base = f"model.path={tiny_llama_dir}"
    assert call("generate", str(exports["live"]), base, *ask) == {"model": str(exports["live"]), "answers": live}
    # The folder's model, not the newest run's adapter on it.
    for arguments in ([f"model.path={exports['merged']}"], [str(exports["merged"])]):
        assert call("generate", *arguments, *ask)["model"] == str(exports["merged"])
    assert call("generate", base, *ask)["model"] == str(tiny_llama_dir)
    for chat, told in (("auto", True), ("never", False)):
        assert main(["generate", base, f"data.chat={chat}", *ask]) == 0
        assert ("the model's chat template" in capsys.readouterr().err) is told
    assert call("generate", base, "data.format=text", *ask)["answers"]
    two = call("generate", *map(str, exports.values()), *ask, code=2)["error"]
    assert two["problem"].startswith("2 exported folders are named")
    with_recipe = call("generate", str(exports["merged"]), "recipe=quickstart", *ask, code=2)["error"]
    assert "brings its own settings" in with_recipe["problem"]
    error = call("generate", str(exports["live"]), *ask, code=2)["error"]
    assert "was a local model" in error["problem"]
    assert "model.path=FOLDER_OF_" in error["fix"]
    assert call("generate", "model=local", *ask, code=2)["error"]["where"] == "model.path"


def test_another_base_under_a_run_is_said(call, tiny_llama_dir: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    call("train", f"model.path={tiny_llama_dir}", "data.path=rows.jsonl", "trainer.max_steps=2", "run_dir=one")
    for base, told in ((tiny_llama_dir, False), (other, True)):
        assert main(["generate", "one", f"model.path={base}", "--prompt", "colour 3:", "--max-new-tokens", "1"]) == 0
        assert ("trained on another base" in capsys.readouterr().err) is told
    for facts in (tmp_path / "one" / "checkpoints").glob("*/made_with.json"):
        facts.write_text('{"base": ')
    assert main(["generate", "one", f"model.path={other}", "--prompt", "colour 3:", "--max-new-tokens", "1"]) == 0


def test_a_run_goes_on_by_its_own_config(call, tiny_llama_dir: Path, capsys, tmp_path: Path) -> None:
    steps = ["trainer.max_steps=3", "trainer.save_steps=1", "optimizer.schedule=constant", "adapter.r=2", "seed=5"]
    call("train", f"model.path={tiny_llama_dir}", "data.path=rows.jsonl", *steps, "run_dir=first")
    run = (tmp_path / "first").rename(tmp_path / "moved")
    longer = ["trainer.max_steps=4", "resume=auto"]
    found = call("train", "run_dir=moved", *longer)
    assert (found["steps"], found["run_dir"]) == (4, "moved")
    found = call("train", f"resume={run}/checkpoints/checkpoint-4", "trainer.max_steps=5")
    assert (found["steps"], Path(found["run_dir"])) == (5, run)
    shown = call("config", "run_dir=moved", "trainer.logging_steps=7")
    assert (shown["seed"], shown["adapter"]["r"], shown["trainer"]["logging_steps"]) == (5, 2, 7)
    assert call("config", "run_dir=moved", "--why", "seed")["source"].startswith("moved/config.yaml:")
    # Without resume it is another run's folder, and with a model the command line says it all.
    assert "holds a finished run" in call("train", "run_dir=moved", code=2)["error"]["problem"]
    plain = call("config", "run_dir=moved", f"model.path={tiny_llama_dir}")
    assert plain["adapter"]["r"] != 2
    assert call("train", "run_dir=nowhere", "resume=auto", code=2)["error"]["where"] == "nowhere"
    assert call("config", "run_dir=nowhere", code=2)["error"]["where"] == "nowhere"
    assert (
        "model.path must be given" in call("train", "resume=null", "data.path=rows.jsonl", code=2)["error"]["problem"]
    )
    # Another folder beside a checkpoint is a new run's, which begins as the old one.
    branch = ["run_dir=branch", f"resume={run}/checkpoints/checkpoint-5", "trainer.max_steps=6"]
    found = call("train", *branch)
    assert (found["steps"], found["run_dir"]) == (6, "branch")
    assert call("config", "run_dir=branch")["seed"] == 5
    # A config can be read where the rows are gone; a folder of a later version is named as that.
    (tmp_path / "rows.jsonl").unlink()
    assert call("config", "run_dir=branch")["data"]["path"] == "rows.jsonl"
    (tmp_path / "branch" / "format.json").write_text('{"format": 99, "qmemtune": "9.0"}')
    assert "format 99" in call("config", "run_dir=branch", code=2)["error"]["problem"]


@pytest.mark.parametrize(
    ("options", "verbs"),
    [
        (["adapter=lora"], "qmemtune eval, qmemtune merge-export, qmemtune generate"),
        (["adapter=peft", "adapter.method=dora", "data.eval_fraction=0"], "qmemtune generate"),
    ],
)
def test_a_run_names_the_verbs_that_take_it(call, tiny_llama_dir: Path, capsys, options, verbs) -> None:
    base = [f"model.path={tiny_llama_dir}", "data.path=rows.jsonl", "trainer.max_steps=1", "run_dir=one"]
    assert main(["train", *base, *options]) == 0
    assert f"next: {verbs}\n" in capsys.readouterr().out


def test_empty_data_is_an_error(call, tiny_llama_dir: Path) -> None:
    Path("empty.jsonl").write_text("", encoding="utf-8")
    error = call("train", f"model.path={tiny_llama_dir}", "data.path=empty.jsonl", "run_dir=three", code=2)["error"]
    assert "empty.jsonl" in (error["where"] or "") + error["problem"]


@pytest.mark.parametrize(
    ("cut", "without", "told"),
    [(0, 0, []), (1, 1, []), (6, 9, ["6 of 60 answers are wrong and were cut"]), (0, 9, ["finds nothing in 9 of 60"])],
)
def test_answers_that_were_cut_or_hold_no_answer_are_said(cut: int, without: int, told: list[str]) -> None:
    found = doubts({"exact_match_rows": 60, "exact_match_cut": cut, "exact_match_without_answer": without})
    assert len(found) == len(told)
    assert all(part in line for part, line in zip(told, found, strict=True))
    assert doubts({"loss": 1.0}) == []
