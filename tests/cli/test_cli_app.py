"""Verbs from the outside: what they print where, their exit codes, and how they fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import qmemtune
from qmemtune.cli.app import main
from qmemtune.config.compose import compose, to_yaml
from qmemtune.errors import RunFailed, UserError

VERBS = ["train", "eval", "merge-export", "generate", "recipes", "config"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Runs a command line; gives the exit code, stdout and stderr."""

    def call(*arguments: str):
        code = main(arguments)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def module(monkeypatch):
    """Puts functions in place of a module that a verb imports when it needs it."""

    def replace(name: str, **functions):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))

    return replace


@pytest.fixture
def finished_run(tmp_path):
    """A run folder as far as the command line reads it."""
    folder = tmp_path / "runs" / "quickstart" / "20260101-000000"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(compose(["recipe=quickstart"]).config))
    (folder / "summary.json").write_text("{}")
    return folder


def test_help_is_a_table_of_verbs(run):
    for arguments in ([], ["--help"], ["-h"]):
        result = run(*arguments)
        assert result.code == 0
        assert all(f"\n  {verb} " in result.out for verb in VERBS)
        assert "..." not in result.out.partition("Commands:")[2], "each verb's line is a whole sentence in 80 columns"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_the_common_options(run, verb):
    result = run(verb, "--help")
    assert result.code == 0
    assert all(option in result.out for option in ("--json", "--debug", "--quiet"))


def test_version(run):
    assert run("--version").out == f"qmemtune {qmemtune.__version__}\n"


def test_mistyped_verb_gets_the_nearest(run):
    result = run("trian")
    assert (result.code, result.out) == (2, "")
    assert "'train'" in result.err
    assert len(result.err.splitlines()) == 1


def test_key_given_as_an_option_is_explained(run):
    result = run("train", "--max-steps", "5")
    assert result.code == 2
    assert "trainer.max_steps=" in result.err


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("--model_name_or_path", "options of the config are written model.path=..."),
        ("--load-in-4bit", "options of the config are written quantization=nf4"),
        ("--config", "a config file is written recipe=FILE"),
    ],
)
def test_options_of_other_tools_are_answered_with_ours(run, option, fix):
    result = run("train", option, "x")
    # How the first half is worded is Click's, and differs between its versions.
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: No such option")
    assert option in result.err
    assert result.err.endswith(f" -> {fix}\n")


def test_an_estimate_without_a_model_asks_for_one(run):
    result = run("estimate")
    assert result.code == 2
    assert "error: model.path must be given -> give model.path=..." in result.err


def test_every_mistake_is_one_line_without_a_traceback(run):
    result = run("config", "recipe=quickstart", "trainer.max_stps=5", "quantization=nf5")
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert "error: trainer.max_stps=5: unknown key trainer.max_stps -> did you mean trainer.max_steps?" in lines


def test_json_error_stands_on_stdout_with_the_same_exit_code(run):
    result = run("config", "recipe=quickstart", "trainer.max_stps=5", "--json")
    assert result.code == 2
    assert json.loads(result.out)["error"] == {
        "problem": "unknown key trainer.max_stps",
        "where": "trainer.max_stps=5",
        "fix": "did you mean trainer.max_steps?",
    }
    assert "error" in json.loads(run("trian", "--json").out)


def test_debug_shows_the_traceback(run):
    result = run("config", "recipe=nothing", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert "error: recipe=nothing: there is no recipe 'nothing'" in result.err


def fails(error):
    def train(composed, *, progress):
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("too short", where="rows.jsonl:3", fix="add"), 2, "error: rows.jsonl:3: too short -> add"),
        (RunFailed("the loss is not a number"), 1, "error: the loss is not a number"),
        (ZeroDivisionError("a\nb"), 1, "internal error: ZeroDivisionError: a b -> run again with --debug"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_failures_have_their_exit_code_and_one_line(run, module, error, code, line):
    module("qmemtune.engine.run", train=fails(error))
    result = run("train", "recipe=quickstart")
    assert result.code == code
    assert line in result.err
    assert "Traceback" not in result.err


def test_an_interrupted_verb_says_so(run, module):
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    module("qmemtune.engine.run", train=stop)
    result = run("train", "recipe=quickstart")
    assert (result.code, result.err.splitlines()[-1]) == (130, "interrupted")


def test_a_failures_own_exit_code_counts(run, module):
    error = RunFailed("stopped at step 3; the checkpoint is saved")
    error.exit_code = 130
    module("qmemtune.engine.run", train=fails(error))
    assert run("train", "recipe=quickstart").code == 130


SUMMARY = {
    "run_dir": "runs/quickstart/x",
    "steps": 5,
    "train_loss": float("nan"),
    "eval": {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.5},
    "trainable_parameters": 123456,
    "tokens_per_s": 512.3,
    "step_s_median": 0.25,
}


def chatty_train(composed, *, progress):
    print("a library speaks")
    progress.message("news")
    return SUMMARY


def test_json_is_the_only_thing_on_stdout(run, module):
    module("qmemtune.engine.run", train=chatty_train)
    result = run("train", "recipe=quickstart", "--json")
    assert json.loads(result.out) == SUMMARY | {"train_loss": None}
    assert "a library speaks" in result.err
    assert "news" in result.err


def test_train_prints_a_summary_and_warnings_apart(run, module):
    module("qmemtune.engine.run", train=chatty_train)
    result = run("train", "recipe=quickstart", "data.split=x")
    assert "held-out: loss 1.0000, perplexity 2.70, exact match 50.0%" in result.out
    assert "run folder: runs/quickstart/x" in result.out
    assert "warning: data.split=x: data.split has no effect" in result.err


def test_a_verb_speaks_before_it_loads(run, module):
    """Libraries alone take seconds to load: a terminal that stays empty looks like a verb that hangs."""
    said = []

    def training(*_args, **_options):
        said.append(sys.stderr.getvalue())
        return SUMMARY

    module("qmemtune.engine.run", train=training)
    run("train", "recipe=quickstart")
    assert said[0].splitlines() == ["checking the run: rows, model, memory ..."]


def test_quiet_leaves_the_result_only(run, module):
    module("qmemtune.engine.run", train=chatty_train)
    result = run("train", "recipe=quickstart", "data.split=x", "--quiet")
    assert result.err == ""
    assert "run folder" in result.out


def test_dry_run_plans_and_trains_nothing(run, module):
    module(
        "qmemtune.engine.plan", plan=lambda composed: {"steps": composed.config.trainer.max_steps, "rows": {"used": 3}}
    )
    module("qmemtune.engine.run", train=fails(AssertionError("trained")))
    result = run("train", "recipe=quickstart", "trainer.max_steps=7", "--dry-run")
    assert result.code == 0
    assert "steps: 7\nrows:\n  used: 3\n" in result.out
    assert json.loads(run("train", "recipe=quickstart", "--dry-run", "--json").out)["rows"] == {"used": 3}


def test_merge_export_takes_the_newest_run_and_says_which(run, module, finished_run):
    def export_run(run_dir, config, *, progress):
        fidelity = {
            "loss_live": 1.0,
            "loss_exported": 1.1,
            "kl_mean": 0.01,
            "kl_max": 0.1,
            "same_token": 0.9,
            "rows": 4,
        }
        facts = {"exact": False, "note": "Why.", "forced": config.export.force, "fidelity": fidelity}
        return {"path": str(run_dir.export), "format": config.export.format, **facts}

    module("qmemtune.export", export_run=export_run)
    result = run("merge-export", "export.format=lora")
    assert result.code == 0
    assert "20260101-000000 (the newest)" in result.err
    assert "approximate: Why." in result.out
    assert "live 1.0000, exported 1.1000" in result.out
    named = run("merge-export", f"run_dir={finished_run}", "--json")
    assert json.loads(named.out)["format"] == "merged"
    assert json.loads(named.out)["forced"] is False
    assert "newest" not in named.err
    assert json.loads(run("merge-export", f"run_dir={finished_run}", "--json", "--force").out)["forced"] is True


def test_plan_of_an_export_writes_nothing(run, module, finished_run):
    planned = {
        "run_dir": "x",
        "formats": {"merged": {"kind": "approximate", "why": "because", "path": "x/export/merged"}},
        "export": {"format": "merged", "path": "x/export/merged", "taken": True, "fold": "distill", "rank": 16}
        | {"base": "auto"},
    }
    module("qmemtune.export.exactness", plan=lambda run_dir, config: planned)
    result = run("merge-export", f"run_dir={finished_run}", "--plan")
    assert result.code == 0
    assert "merged  approximate  because" in result.out
    told = " ".join(result.out.split())
    assert "export.format=merged, made static by export.fold=distill at rank 16" in told
    assert "whichever has the lower loss, to x/export/merged, where something is already: --force replaces" in told


@pytest.mark.parametrize("verb", ["eval", "merge-export", "generate"])
def test_verbs_of_a_run_say_when_there_is_none(run, verb, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert "there is no finished run here" in run(verb).err
    result = run(verb, "run_dir=nowhere")
    assert result.code == 2
    assert "nowhere: there is no such folder" in result.err


def metrics(loss: float, match: float):
    return {
        "loss": loss,
        "perplexity": 2.0,
        "exact_match": match,
        "rows": 9,
        "groups": {"sort": {"exact_match": match, "rows": 4}},
    }


def test_eval_prints_base_and_tuned_side_by_side_and_writes_json(run, module, finished_run):
    change = {"difference": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    report = {
        "base": metrics(2.0, 0.0),
        "tuned": metrics(1.0, 0.5),
        "difference": {"exact_match": change, "groups": {"sort": {"exact_match": change}}},
        "rows": 9,
        "examples": [{"prompt": "p", "expected": "e", "base": "b", "tuned": "[bold]t"}],
    }
    loaded = SimpleNamespace(model=None, tokenizer=None, source=None, device=None, dtype=None)
    module("qmemtune.engine.restore", load_run=lambda run_dir, config: loaded)
    module("qmemtune.data.prepare", prepare_heldout=lambda config, tokenizer: SimpleNamespace(heldout=[1]))
    module("qmemtune.evaluation.verb", evaluate_pair=lambda *args, **options: report)
    (finished_run / "adapter").mkdir(exist_ok=True)
    (finished_run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    result = run("eval")
    assert result.code == 0
    table = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "exact match 0.0% 50.0% +50.0 points (+40.0 to +60.0) 9" in table
    assert "exact match, sort 0.0% 50.0% +50.0 points (+40.0 to +60.0) 4" in table
    assert "tuned: [bold]t" in table
    assert json.loads((finished_run / "eval.json").read_text())["tuned"]["loss"] == 1.0
    assert json.loads(run("eval", "--json").out)["base"]["exact_match"] == 0.0


def test_eval_of_an_adapters_folder_says_what_to_do(run, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    result = run("eval", "recipe=quickstart", "model.path=./lora")
    assert result.code == 2
    assert "./lora: this folder holds an adapter" in result.err


def test_config_prints_yaml_that_composes_again(run, tmp_path):
    result = run("config", "recipe=quickstart", "seed=5")
    (tmp_path / "again.yaml").write_text(result.out)
    assert run("config", "recipe=./again.yaml").out == result.out
    assert json.loads(run("config", "recipe=quickstart", "--json").out)["trainer"]["max_steps"] == 110


def test_config_without_a_recipe_shows_defaults_and_what_is_missing(run):
    result = run("config")
    assert result.code == 0
    assert "path: ???" in result.out
    assert "model.path must still be given" in result.err


def test_why_names_the_source_and_what_it_replaced(run):
    result = run("config", "recipe=quickstart", "trainer.max_steps=5", "--why", "trainer.max_steps")
    lines = result.out.splitlines()
    assert lines[:2] == ["trainer.max_steps = 5", "set by trainer.max_steps=5"]
    assert "recipes/quickstart.yaml:" in lines[2]
    assert "default (schema)" in lines[3]
    explained = json.loads(run("config", "recipe=quickstart", "--why", "optimizer.eps", "--json").out)
    assert (explained["value"], explained["source"]) == (1e-8, "default (schema)")
    columns = json.loads(run("config", "recipe=smollm2_gsm8k", "--why", "data.columns.prompt", "--json").out)
    assert columns["value"] == "question"
    assert "did you mean trainer.max_steps?" in run("config", "--why", "max_steps").err
    other = run("config", "--why", "adapter.num_atoms")
    assert "adapter.num_atoms belongs to adapter=queryable, this is lora -> add adapter=queryable" in other.err
    assert other.code == 2


def test_recipes_on_a_narrow_terminal_keep_their_names_whole():
    import io

    from rich.console import Console

    from qmemtune.cli.recipes import _show

    console = Console(file=io.StringIO(), width=60)
    _show(console, [{"name": "a_long_recipe_name", "own": True, "model": "org/a-model", "needs": "2 CPU cores " * 9}])
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[:2] == ["a_long_recipe_name", "  model: org/a-model"]


def test_shades_of_atoms_stay_whole_on_a_narrow_terminal():
    import io

    from rich.console import Console

    from qmemtune.cli.inspect import _blocks

    use = [0.0, 0.5, 0.0, 0.5, *[0.0] * 12]
    block = {"block": 0, "layers": ["0", "1", "2", "3", "4"], "entropy": 0.5, "effective_atoms": 2.0, "use": use}
    console = Console(file=io.StringIO(), width=60)
    console.print(_blocks({"blocks": [block]}))
    assert f" █ █{' ' * 12}" in console.file.getvalue()


def test_why_of_a_section_names_the_source_of_each_key(run):
    result = run("config", "recipe=quickstart", "optimizer.eps=1e-6", "--why", "optimizer")
    lines = result.out.splitlines()
    assert "optimizer.eps = 1e-06  (optimizer.eps=1e-6)" in lines
    assert lines[-1].endswith("(default (schema))")
    assert {line.partition(".")[0] for line in lines} == {"optimizer"}


def test_recipes_lists_the_tools_and_the_users(run, tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults: [/model: local, _self_]\ndescription: my own\n")
    (folder / "broken.yaml").write_text("seed: x\n")
    listed = {row["name"]: row for row in json.loads(run("recipes", "--json").out)["recipes"]}
    assert listed["quickstart"]["own"]
    assert (listed["mine"]["own"], listed["mine"]["description"]) == (False, "my own")
    assert "whole number" in listed["broken"]["error"]
    assert "mine (yours)" in run("recipes").out


LIGHT = """
import sys
from qmemtune.cli.app import main
for arguments in (["--help"], ["--version"], ["train", "--help"]):
    assert main(arguments) == 0
print([name for name in {heavy!r} if name in sys.modules])
"""


def test_help_and_version_load_nothing_heavy():
    heavy = ["torch", "transformers", "peft", "datasets", "numpy", "hydra", "omegaconf", "yaml", "rich"]
    done = subprocess.run([sys.executable, "-c", LIGHT.format(heavy=heavy)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


START = [sys.executable, "-c", "import sys; from qmemtune.cli.app import main; sys.exit(main())"]


def test_config_loads_no_torch_and_a_closed_pipe_is_quiet():
    lines = ["import sys; from qmemtune.cli.app import main", "main(['config', 'recipe=quickstart'])"]
    code = "\n".join([*lines, "print('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    process = subprocess.Popen([*START, "config", "recipe=quickstart"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


def test_exit_code_reaches_the_shell():
    done = subprocess.run([*START, "config", "seed=x", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["where"] == "seed=x"


@pytest.mark.parametrize("verb", ["eval", "merge-export", "generate", "inspect", "resume-check"])
def test_verbs_of_a_run_take_its_folder_as_it_stands(run, module, finished_run, verb):
    """A run that does not exist is refused by name, and no other run is taken in its place."""
    stdin = ["--prompt", "hi"] if verb == "generate" else []
    result = run(verb, "runs/quickstart/nope", *stdin)
    assert result.code == 2
    assert result.err.startswith("error: runs/quickstart/nope: there is no such folder (seen from ")
    result = run(verb, "runs/quickstart", *stdin)
    assert "name one run: the newest in there is runs/quickstart/20260101-000000" in result.err
    (finished_run / "format.json").write_text('{"format": 2}')
    (finished_run / "adapter").mkdir()
    result = run(verb, str(finished_run / "adapter"), *stdin)
    assert "did you mean runs/quickstart/20260101-000000, the run that it lies in?" in result.err
    assert len(result.err.splitlines()) == 1


def test_an_exported_folder_may_stand_bare(tmp_path):
    from qmemtune.cli.target import split_export, with_folder

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "qmemtune.json").write_text("{}")
    assert split_export(with_folder(["out", "model.path=base"])) == (Path("out"), ["model.path=base"])
    assert with_folder(["runs/a", "data.max_eval_rows=3"]) == ["run_dir=runs/a", "data.max_eval_rows=3"]
