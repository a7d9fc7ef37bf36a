"""Where the verbs' parts meet, on one tiny trained run: folders moved and rows gone, prompts, several processes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qmemtune.cli.app import main
from qmemtune.config.of_run import load_resolved
from qmemtune.data.render import render_prompt
from qmemtune.engine.restore import load_run
from qmemtune.evaluation.generate import stream_answer
from qmemtune.rundir import RunDir

COLOURS = ["red", "green", "blue", "white", "black"]


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, the run ``one`` of a memory with an instruction prior, and its export ``live``."""
    folder = tmp_path_factory.mktemp("joins")
    rows = [
        {"instruction": f"Name colour {i}", "output": COLOURS[i % 5], "kind": "even" if i % 2 == 0 else "odd"}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    run = ["train", f"model.path={tiny_llama_dir}", f"data.path={folder / 'rows.jsonl'}", "data.group_by=kind"]
    adapter = ["adapter=queryable", "adapter.r=4", "adapter.instruction_prior=1", "quantization=nf4"]
    steps = ["optimizer.learning_rate=0.05", "trainer.max_steps=4", "data.eval_fraction=0.3", "evaluation.max_rows=9"]
    assert main([*run, *adapter, *steps, f"run_dir={folder / 'one'}", "--quiet"]) == 0
    for form in ("live", "merged"):
        export = [f"run_dir={folder / 'one'}", f"export.format={form}", f"export.path={folder / form}"]
        assert main(["merge-export", *export, "export.calibration_rows=4", "--quiet"]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb is called from a folder that holds nothing."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Runs a command line with ``--json``; gives its one JSON object."""

    def run(*arguments: str, code: int = 0) -> dict:
        capsys.readouterr()
        found = main([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert found == code, err
        return json.loads(out)

    return run


def with_base(folder: Path, copy: Path, source: str) -> Path:
    """A copy of an export whose marker names a base that can be found."""
    shutil.copytree(folder, copy)
    marker = json.loads((copy / "qmemtune.json").read_text(encoding="utf-8"))
    marker["base"] |= {"source": source, "local": False}
    (copy / "qmemtune.json").write_text(json.dumps(marker), encoding="utf-8")
    return copy


@pytest.mark.parametrize("form", ["live", "merged"])
def test_an_export_is_measured_as_its_run_was(call, trained, tmp_path, tiny_llama_dir, form):
    of_run = call("eval", f"run_dir={trained / 'one'}")
    folder = with_base(trained / form, tmp_path / "copy", str(tiny_llama_dir))
    shutil.copy(trained / "rows.jsonl", tmp_path)
    found = call("eval", f"model.path={folder}")
    assert (found["format"], found["base_model"], found["rows"]) == (form, str(tiny_llama_dir), 9)
    assert found["base"]["loss"] == pytest.approx(of_run["base"]["loss"], abs=1e-5)
    assert found["base"]["groups"].keys() == {"even", "odd"}
    change = found["tuned"]["loss"] - found["base"]["loss"]
    assert found["difference"]["loss"]["difference"] == pytest.approx(change, abs=1e-6)
    if form == "live":
        assert found["tuned"]["loss"] == pytest.approx(of_run["tuned"]["loss"], abs=1e-5)
    assert call("eval", f"model.path={folder}", "evaluation.max_rows=3")["rows"] == 3


def test_what_a_marker_cannot_hold_is_asked_for(call, trained, tmp_path, tiny_llama_dir):
    folder, base = trained / "live", f"model.path={tiny_llama_dir}"
    asked = call("eval", f"export.path={folder}", base, code=2)["error"]
    assert "rows.jsonl does not exist" in asked["problem"]
    assert "data.path=" in asked["fix"]
    data = f"data.path={trained / 'rows.jsonl'}"
    asked = call("eval", f"model.path={folder}", data, code=2)["error"]
    assert f"export.path={folder} model.path=FOLDER_OF_{tiny_llama_dir.name}" in asked["fix"]
    assert call("eval", f"export.path={folder}", base, data)["base"]["loss"] > 0
    assert "holds no qmemtune.json" in call("eval", f"export.path={tmp_path}", code=2)["error"]["problem"]
    both = call("eval", f"export.path={folder}", f"run_dir={trained / 'one'}", code=2)["error"]
    assert "a run and an exported folder" in both["problem"]


def test_a_base_that_cannot_be_loaded_leaves_the_merged_model(trained, tmp_path, capsys):
    folder = with_base(trained / "merged", tmp_path / "copy", "nobody/has-this-model")
    assert main(["eval", f"model.path={folder}", f"data.path={trained / 'rows.jsonl'}", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["base"] is None
    assert "the base is not measured: " in err


@pytest.mark.parametrize("content", ["[]", "{}", '{"base": {"source": "a"}, "format": "merged"}'])
def test_a_damaged_marker_is_named(call, tmp_path, content):
    (tmp_path / "qmemtune.json").write_text(content, encoding="utf-8")
    error = call("eval", f"model.path={tmp_path}", code=2)["error"]
    assert error["where"] == str(tmp_path / "qmemtune.json")


def test_a_marker_decides_no_code(call, trained, tmp_path, tiny_llama_dir):
    folder = with_base(trained / "merged", tmp_path / "copy", str(tiny_llama_dir))
    marker = json.loads((folder / "qmemtune.json").read_text(encoding="utf-8"))
    marker["model"] = {"trust_remote_code": True}
    marker["data"] |= {"_target_": "os.system", "prompt_template": "${oc.env:HOME} {instruction}"}
    (folder / "qmemtune.json").write_text(json.dumps(marker), encoding="utf-8")
    assert "cannot name code" in call("eval", f"model.path={folder}", code=2)["error"]["problem"]


@pytest.fixture
def without_rows(trained, tmp_path) -> Path:
    """The run, moved, its training file gone."""
    run = shutil.copytree(trained / "one", tmp_path / "moved")
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8").replace(str(trained / "rows.jsonl"), str(tmp_path / "gone.jsonl"))
    config.write_text(text, encoding="utf-8")
    return run


def test_prompts_are_rendered_as_in_training_without_the_rows(call, trained, without_rows):
    config = load_resolved(trained / "one" / "config.yaml", []).config
    assert config.data.format == "alpaca"
    loaded = load_run(RunDir(trained / "one"), config)
    expected = "".join(stream_answer(loaded, "Name colour 3", max_new_tokens=5))
    text = loaded.tokenizer.decode(render_prompt(config.data, loaded.tokenizer, "Name colour 3"))
    assert "### Instruction:\nName colour 3\n\n### Response:\n" in text
    found = call("generate", f"run_dir={without_rows}", "--prompt", "Name colour 3", "--max-new-tokens", "5")
    assert found["answers"] == [{"prompt": "Name colour 3", "answer": expected}]
    assert "gone.jsonl does not exist" in call("eval", f"run_dir={without_rows}", code=2)["error"]["problem"]


def test_rows_of_two_forms_stay_to_be_recognised(trained, tiny_llama_dir):
    Path("held.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3, encoding="utf-8")
    data = [f"data.path={trained / 'rows.jsonl'}", "data.eval_path=held.jsonl"]
    assert main(["train", f"model.path={tiny_llama_dir}", *data, "trainer.max_steps=1", "run_dir=two", "--quiet"]) == 0
    assert load_resolved(Path("two/config.yaml"), []).config.data.format == "auto"
    assert main(["eval", "run_dir=two", "--quiet"]) == 0


def test_a_finished_run_resumed_says_so_and_another_is_refused(call, capsys, trained, tiny_llama_dir):
    train = ["train", f"model.path={tiny_llama_dir}", f"data.path={trained / 'rows.jsonl'}", "data.eval_fraction=0.3"]
    train += ["trainer.max_steps=2", "run_dir=three"]
    planned = call(*train, "--dry-run")
    assert (planned["steps"], planned["first_step"], planned["trainable_parameters"] > 0) == (2, 0, True)
    assert not Path("three").exists()
    first = call(*train)
    assert "finished run" in call(*train, code=2)["error"]["problem"]
    weights = Path("three/adapter/adapter_model.safetensors").read_bytes()
    assert main([*train, "resume=auto", "--json"]) == 0
    out, err = capsys.readouterr()
    again = json.loads(out)
    assert again["steps"] == 2
    assert again["eval"]["loss"] == pytest.approx(first["eval"]["loss"], abs=1e-6)
    assert "all 2 steps are done already" in err
    assert Path("three/adapter/adapter_model.safetensors").read_bytes() == weights
    # Going on with more steps sees the recognised row form as no change.
    assert call(*train, "trainer.max_steps=3", "resume=auto", "resume.allow_changes=true")["steps"] == 3


def test_a_dry_run_says_how_much_of_the_batches_is_padding(call, tiny_llama_dir):
    rows = [json.dumps({"prompt": "a " * n, "completion": " b"}) for n in range(1, 65)]
    Path("uneven.jsonl").write_text("\n".join(rows), encoding="utf-8")
    train = ["train", f"model.path={tiny_llama_dir}", "data.path=uneven.jsonl", "data.eval_fraction=0", "--dry-run"]
    padded = [*train, "trainer.padding_free=false"]
    alike, at_random = (call(*padded, f"trainer.length_grouping={on}")["padding"] for on in ("true", "false"))
    assert 0.02 < alike < 0.5 * at_random < 0.3
    assert call(*padded, "trainer.per_device_train_batch_size=1")["padding"] == 0
    assert call(*padded)["padding"] == alike
    assert call(*train)["padding"] == 0


def stdin(text: str, *, terminal: bool) -> io.StringIO:
    stream = io.StringIO(text)
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    return stream


def test_prompts_from_every_side(call, capsys, monkeypatch, trained):
    common = ["generate", f"run_dir={trained / 'one'}", "--max-new-tokens", "4"]
    own = call(*common, "prompt=Name colour 3")["answers"][0]["answer"]
    same = call(*common, "prompt=Name colour 3", "instruction=Name colour 3")["answers"][0]["answer"]
    assert own == same
    prompts = [{"prompt": "Name colour 3"}, {"messages": [{"role": "user", "content": "Name colour 3"}]}]
    Path("p.jsonl").write_text("\n".join(json.dumps(row) for row in prompts), encoding="utf-8")
    answers = call(*common, "--file", "p.jsonl")["answers"]
    assert answers[0]["answer"] == own
    assert len(answers) == 2
    monkeypatch.setattr(sys, "stdin", stdin("Name colour 3\nName colour 4\n", terminal=False))
    assert call(*common)["answers"][0]["answer"] == own
    monkeypatch.setattr(sys, "stdin", stdin("Name colour 3\n", terminal=True))
    assert main([*common, "--quiet"]) == 0
    assert own in capsys.readouterr().out


def test_rows_that_cannot_be_asked_are_all_named_before_the_first_answer(call, trained):
    rows = [{"prompt": "Name colour 3"}, *[{"q": "x", "a": "y"}] * 10]
    Path("odd.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    findings = call("generate", f"run_dir={trained / 'one'}", "--file", "odd.jsonl", code=2)["error"]["findings"]
    assert [found["where"] for found in findings] == [f"odd.jsonl:{line}" for line in range(2, 10)] + ["11 rows"]
    assert findings[0]["problem"].startswith("there is no ")
    assert findings[0]["fix"].endswith("the row has q, a")
    assert findings[-1]["problem"] == "and 2 more"


def test_the_instruction_reaches_the_prior(trained):
    config = load_resolved(trained / "one" / "config.yaml", []).config
    loaded = load_run(RunDir(trained / "one"), config)
    assert loaded.source.active
    seen: list[str] = []
    context = loaded.source.context
    loaded.source.context = lambda texts: (seen.extend(texts), context(texts))[1]
    list(stream_answer(loaded, "Name colour 3", max_new_tokens=1))
    list(stream_answer(loaded, "Name colour 3", instruction="sort", max_new_tokens=1))
    assert seen == ["Name colour 3", "sort"]


def test_a_plain_prompt_is_fed_as_it_is(trained, tiny_llama_dir):
    Path("plain.jsonl").write_text('{"prompt": "Q: {x} ", "completion": "b"}\n' * 9, encoding="utf-8")
    data = ["data.path=plain.jsonl", "data.format=prompt_completion"]
    assert main(["train", f"model.path={tiny_llama_dir}", *data, "trainer.max_steps=1", "run_dir=p", "--quiet"]) == 0
    config = load_resolved(Path("p/config.yaml"), []).config
    loaded = load_run(RunDir(Path("p")), config)
    ids = render_prompt(config.data, loaded.tokenizer, "Q: {x} <|im_end|>")
    # What looks like a special token in a prompt is text.
    assert loaded.tokenizer.eos_token_id not in ids
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "Q: {x} <|im_end|>"


def test_mistakes_have_a_way_out(call, monkeypatch, trained, tiny_llama_dir):
    assert "train one with" in call("eval", code=2)["error"]["fix"]
    typo = call("train", f"model.path={tiny_llama_dir}", "data.path=generated:word_lists", "trainer.max_stps=5", code=2)
    assert "did you mean trainer.max_steps?" in typo["error"]["fix"]


@pytest.mark.parametrize(("name", "number"), [("RANK", 1), ("LOCAL_RANK", 1), ("RANK", 0)])
def test_one_process_of_several_speaks(capsys, monkeypatch, name, number):
    def train(composed, *, progress):
        print("a library speaks")
        return {"run_dir": "r", "steps": 1, "trainable_parameters": 1}

    monkeypatch.setenv(name, str(number))
    monkeypatch.setitem(sys.modules, "qmemtune.engine.run", SimpleNamespace(train=train))
    run = ["train", "recipe=quickstart", "data.split=x"]
    assert main([*run, "--json"]) == 0
    assert main(run) == 0
    assert main([*run, "seed=x", "--json"]) == 2
    out, err = capsys.readouterr()
    if number:
        assert (out, err) == ("", "a library speaks\n" * 2)
    else:
        assert [line[:8] for line in out.splitlines() if line.startswith("{")] == ['{"run_di', '{"error"']
        assert "error: seed=x" in err


def test_a_failure_of_one_process_is_shown(capsys, monkeypatch):
    def train(composed, *, progress):
        raise MemoryError("too much")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setitem(sys.modules, "qmemtune.engine.run", SimpleNamespace(train=train))
    assert main(["train", "recipe=quickstart", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "MemoryError: too much (in process 3)" in err
