"""Files made to do harm: each attempt is refused with its reason, and nothing of it runs or is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from qmemtune.cli.app import main
from qmemtune.credentials import hide, holds_token
from qmemtune.engine import checkpoints

CANARY = "canary"


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder with a module that tells when it is imported."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "harmful_module.py").write_text(f"from pathlib import Path\nPath({str(place / CANARY)!r}).touch()\n")
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


@pytest.fixture
def refused(capsys, folder):
    """Runs a command line that must end as the user's mistake; gives what it said."""

    def call(*arguments: str) -> str:
        code = main(list(arguments))
        said = capsys.readouterr()
        assert code == 2, said.err
        assert not (folder / CANARY).exists(), "something was run"
        assert "Traceback" not in said.err
        assert "internal error" not in said.err
        return said.err

    return call


OVERRIDES = [
    *("data.path=rows.jsonl", "adapter=lora", "adapter.r=2", "run_dir=run"),
    *("trainer.per_device_train_batch_size=2", "trainer.max_steps=2", "trainer.save_steps=1"),
]


@pytest.fixture(scope="session")
def trained_once(tiny_llama_dir, tmp_path_factory, session_cache) -> Path:
    """A folder with rows and a finished tiny run with two checkpoints."""
    place = tmp_path_factory.mktemp("trained")
    (place / "rows.jsonl").write_text('{"prompt": "a b", "completion": " c"}\n' * 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("QMEMTUNE_CACHE", str(session_cache))
        assert main(["train", f"model.path={tiny_llama_dir}", *OVERRIDES]) == 0
    return place


@pytest.fixture
def trained(trained_once, tiny_llama_dir, folder, capsys):
    """A copy of that run, which a test may change."""
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    capsys.readouterr()
    return SimpleNamespace(path=folder / "run", overrides=[f"model.path={tiny_llama_dir}", *OVERRIDES])


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, levels)]
    return "\n".join(lines)


CONFIGS = {
    "object tag": ("seed: !!python/object/apply:pathlib.Path.touch [canary]", "not allowed: a config is data"),
    "name tag": ("description: !!python/name:os.system", "not allowed: a config is data"),
    "tag of the whole": ("!!set\ndefaults: [/model: local]\nseed: 1", "not allowed: a config is data"),
    "tag of a section": ("data: !!python/object:harmful_module.Thing {path: x}", "not allowed: a config is data"),
    "own tag": ("description: !include /etc/passwd", "not allowed: a config is data"),
    "target": ("model: {_target_: harmful_module.run}", "cannot name code to run"),
    "target below": ("data: {sources: {a: {_target_: os.system, path: x}}}", "cannot name code to run"),
    "environment": ("description: ${oc.env:HOME}", "resolvers such as oc.env are switched off"),
    "decoding": ("description: ${oc.decode:x}", "resolvers such as oc.env are switched off"),
    "hydra": ("hydra: {run: {dir: /tmp/x}}", "cannot configure Hydra"),
    "search path": ("hydra.searchpath: [file:///etc]", "cannot configure Hydra"),
    "alias bomb": (bomb(), "aliases stand for too many values"),
    "alias of itself": ("data: &a {x: *a}", "alias that holds itself"),
    "too deep": ("[" * 5000, "nested too deeply"),
    "too large": ("description: " + "x" * (1 << 20), "too large for a config"),
    "option above": ("defaults: [/model: ../../outside, _self_]", "is no option of the group model"),
    "config above": ("defaults: [../outside, _self_]", "does not exist"),
    "option anywhere": ("defaults: [/model: /etc/outside, _self_]", "is no option of the group model"),
    "recipe's name": ("recipe: ../../outside", "cannot name a folder"),
    "code in an override": ("seed: 1", "cannot name code to run", "model._target_=os.system"),
    "group above": ("seed: 1", "is no option of the group data", "data=../../outside"),
    "read the environment": ("seed: 1", "unknown key hydra.searchpath", "hydra.searchpath=[file:///etc]"),
}


@pytest.mark.parametrize("attempt", CONFIGS)
def test_configs(refused, folder, attempt):
    text, reason, *overrides = CONFIGS[attempt]
    for place in (folder.parent, folder.parent.parent):
        (place / "outside.yaml").write_text("path: outside/was-read\n")
    Path("evil.yaml").write_text(text)
    said = refused("train", "recipe=./evil.yaml", *overrides)
    assert reason in said
    assert "was-read" not in said


@pytest.mark.parametrize("name", ["m.zip", "m.tar.gz", "m.tar", "m.bin", "m.pt", "m.ckpt", "m.pkl"])
def test_archives_and_pickles_as_models(refused, folder, name):
    harmful(folder / name)
    said = refused("train", f"model.path=./{name}", "data.path=generated:word_lists")
    assert "not a model" in said or "pickled weights are refused" in said


@pytest.mark.parametrize("name", ["d.zip", "d.tar.gz", "d.pkl", "d.pt", "d.npy"])
def test_archives_and_pickles_as_data(refused, folder, tiny_llama_dir, name):
    harmful(folder / name)
    assert "names no known kind of file" in refused("train", f"model.path={tiny_llama_dir}", f"data.path=./{name}")


def harmful(path: Path) -> None:
    inner = path.with_name("inner.jsonl")
    inner.write_text('{"prompt": "a", "completion": "b"}\n')
    if ".zip" in path.name:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, "../../inner.jsonl")
    elif ".tar" in path.name:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            archive.add(inner, "../../inner.jsonl")
    else:
        path.write_bytes(pickle.dumps(Harm(path.with_name(CANARY))))


def test_code_of_a_model_and_of_its_tokenizer(refused, folder, tiny_llama_dir):
    for file, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        copy = folder / key
        shutil.copytree(tiny_llama_dir, copy)
        facts = json.loads((copy / file).read_text())
        facts |= {"model_type": "unknown_kind", "tokenizer_class": "Unknown"}
        facts["auto_map"] = {key: ["harmful_module.Thing", None] if key == "AutoTokenizer" else "harmful_module.Thing"}
        (copy / file).write_text(json.dumps(facts))
        shutil.copy(folder / "harmful_module.py", copy)
        main(["train", "--dry-run", f"model.path={copy}", "data.path=generated:word_lists"])
        assert not (folder / CANARY).exists()
    assert "trust_remote_code" in refused(
        "train", "--dry-run", f"model.path={folder / 'AutoConfig'}", "data.path=generated:word_lists"
    )


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "x.bin"])
def test_weights_outside_of_the_models_folder(refused, folder, tiny_llama_dir, name):
    shutil.copytree(tiny_llama_dir, folder / "model")
    shutil.copy(tiny_llama_dir / "model.safetensors", folder)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused("train", "model.path=./model", "data.path=generated:word_lists")
    assert "which is no weight file of its folder" in said


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches beyond the conversation"),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", "reaches beyond the conversation"),
        ("{% include '/etc/passwd' %}", "it fails on a plain question and answer: no loader"),
    ],
)
def test_chat_templates(refused, folder, tiny_llama_dir, template, reason):
    (folder / "t.jinja").write_text(template)
    (folder / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 9
    )
    said = refused("data", f"model.path={tiny_llama_dir}", "data.path=chat.jsonl", "model.chat_template=./t.jinja")
    assert reason in said
    assert "subclass" not in said.replace(template, "")


def test_adapters(refused, trained, folder):
    adapter = trained.path / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "megatron_config": {"a": 1}, "megatron_core": "harmful_module"})
    )
    assert "names a Python module to import" in refused("eval", "run_dir=run")
    (adapter / "adapter_config.json").write_text("[1")
    assert "cannot be read" in refused("eval", "run_dir=run")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Harm(folder / CANARY)))
    assert "pickled weights are refused" in refused("eval", "run_dir=run")


def test_checkpoints_that_are_or_hold_links(refused, trained, folder, capsys):
    newest, elsewhere = trained.path / "checkpoints" / "checkpoint-2", folder / "elsewhere"
    again = [*trained.overrides, "trainer.max_steps=3", "resume.allow_changes=true"]
    newest.rename(elsewhere)
    newest.symlink_to(elsewhere)
    assert "holds a link: checkpoint-2 leads to" in refused("train", *again, f"resume={newest}")
    newest.unlink()
    elsewhere.rename(newest)
    weights = newest / "adapter_model.safetensors"
    weights.rename(folder / "weights")
    weights.symlink_to(folder / "weights")
    assert "holds a link: adapter_model.safetensors leads to" in refused("train", *again, f"resume={newest}")
    # resume=auto passes over it, and deletes nothing that a link leads to.
    shutil.rmtree(newest)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    newest.symlink_to(elsewhere)
    assert main(["train", *again, "resume=auto"]) == 0
    assert (elsewhere / "precious").read_text() == "x"


def test_a_pickled_state_of_a_checkpoint_is_not_run(refused, trained, folder):
    newest = trained.path / "checkpoints" / "checkpoint-2"
    facts = json.loads((newest / "manifest.json").read_text())
    import torch

    torch.save({"state": Harm(folder / CANARY)}, newest / "optimizer.pt")
    # With a manifest that fits: a hash keeps no one from making both.
    (newest / "manifest.json").unlink()
    root = newest.parent
    writing = checkpoints.begin(root)
    newest.rename(writing / newest.name)
    known = {name: value for name, value in facts.items() if name not in ("files", "digest", "format")}
    checkpoints.complete(writing / newest.name, root, known)
    more = ("trainer.max_steps=3", "resume.allow_changes=true")
    said = refused("train", *trained.overrides, *more, f"resume={newest}")
    assert "is refused, since loading it could run code" in said


HF, WANDB, SHORT = "hf_" + "Planted7" * 4, "0123456789abcdef" * 2 + "01234567", "abc"


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", HF)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    # So short a value is in ordinary words and hides nothing.
    monkeypatch.setenv("SOME_SECRET", SHORT)


def test_tokens_are_written_nowhere(planted, trained, folder, capsys, monkeypatch):
    from transformers.integrations import TensorBoardCallback

    def fail(self, *args, **kwargs):
        raise ConnectionError(f"401 for https://user:{WANDB}@service/, token {HF}")

    monkeypatch.setattr(TensorBoardCallback, "on_log", fail)
    fresh = [word for word in trained.overrides if not word.startswith("run_dir")]
    assert main(["train", *fresh, "run_dir=fresh", "tracking.backends=[tensorboard]"]) == 0
    assert main(["eval", "run_dir=fresh"]) == 0
    assert main(["merge-export", "run_dir=fresh", "export.fidelity=false"]) == 0
    for verb in ("doctor", "config", "recipes"):
        main([verb])
    said = capsys.readouterr()
    assert "tensorboard failed" in said.err
    written = [file for file in folder.rglob("*") if file.is_file()]
    assert len(written) > 20
    for text in (said.out, said.err, *(file.read_bytes().decode("latin-1") for file in written)):
        assert HF not in text
        assert WANDB not in text


@pytest.mark.parametrize(
    "name",
    [
        "sk_news_articles_2023_train.jsonl",
        "sk-learn-Models-of-2023-train.jsonl",
        "ghs_of_all_countries_of_the_year_2023",
    ],
)
def test_names_of_files_are_no_tokens(name):
    assert not holds_token(name)


@pytest.mark.parametrize(
    "token",
    ["sk-" + "a1B2" * 12, "sk-proj-" + "a1B2c_" * 3 + "d3E4" * 8, "glpat-" + "x9Yz" * 5, "github_pat_" + "a1B2" * 9],
)
def test_tokens_of_many_kinds_are_known(token):
    assert hide(f"key {token}, and more") == "key ***, and more"


@pytest.mark.parametrize("token", [HF, WANDB, "https://me:secret-word@host/x", "ghp_" + "a1B2" * 9])
@pytest.mark.parametrize("where", ["tracking.name={}", "unknown_key={}", "{}", "data.path=/x/{}/y", "--{}", "~{}"])
def test_tokens_in_options_are_refused_and_not_repeated(planted, capsys, token, where):
    code = main(["train", "recipe=quickstart", where.format(token), "--debug"])
    said = capsys.readouterr()
    assert code == 2
    assert token.removeprefix("https://me:").removesuffix("@host/x") not in said.out + said.err
    assert "***" in said.err
    if "=" in where:
        assert "holds an access token" in said.err


def test_tokens_in_files_are_refused_and_not_repeated(planted, refused):
    Path("mine.yaml").write_text(f"tracking:\n  name: {HF}\ndescription: 'a {WANDB} b'\n")
    said = refused("train", "recipe=./mine.yaml", "--json")
    assert said.count("holds an access token") == 2
    assert HF not in said
    assert WANDB not in said
    assert os.environ["HF_TOKEN"] == HF
