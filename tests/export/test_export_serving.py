"""What goes out of the house: cards whose code runs, GGUF files, uploads."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.data import SourceConfig
from qmemtune.config.missing import MISSING
from qmemtune.engine.restore import load_run
from qmemtune.errors import RunFailed, UserError
from qmemtune.export import export_run
from qmemtune.export.hub import push
from qmemtune.export.opening import open_exported
from qmemtune.export.pin import check_base, weights_digest
from qmemtune.models.sources import resolve

MEMORY = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, temperature=9.0, init_core_std=1.0)
PRIOR = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, instruction_prior=1.0)
IDS = torch.arange(10, 40).view(2, 15)


@pytest.mark.parametrize(
    ("adapter", "format"), [(MEMORY, "live"), (PRIOR, "live"), (MEMORY, "lora"), (LoraConfig(r=4), "merged")]
)
def test_the_code_of_a_card_runs(make_run, capsys, adapter, format: str) -> None:
    run, config = make_run(adapter, format=format)
    folder = Path(export_run(run, config)["path"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    program = card.split("```python\n")[1].split("```")[0]
    assert len([line for line in program.splitlines() if line]) <= 11
    program = program.replace("THIS_FOLDER", str(folder)).replace("YOUR PROMPT", "Say fox").replace("=64", "=4")
    program = program.replace(f'"{Path(config.model.path).name}"', repr(config.model.path))
    names: dict = {}
    exec(program, names)
    assert capsys.readouterr().out
    if format == "live":
        expected = load_run(run, config).model
        with torch.no_grad():
            assert torch.equal(names["model"](IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_the_code_of_a_card_runs_where_the_base_is_a_gguf_file(make_run, tiny_gguf, tmp_path, capsys, kind) -> None:
    run, config = make_run(MEMORY, format="live", base_path=tiny_gguf, kind=kind)
    folder = Path(export_run(run, config)["path"])
    program = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    program = program.replace("THIS_FOLDER", str(folder)).replace("FOLDER_OF_THE_FILE", str(tiny_gguf.parent))
    program = program.replace("UNPACKED_BASE", str(tmp_path / "unpacked")).replace("=64", "=4")
    names: dict = {}
    exec(program, names)
    expected = load_run(run, config).model
    with torch.no_grad():
        torch.testing.assert_close(names["model"](IDS).logits, expected(IDS).logits)


def test_transformers_alone_loads_the_live_model(make_run) -> None:
    run, config = make_run(MEMORY, format="live")
    folder = export_run(run, config)["path"]
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    base.load_adapter(folder)
    with torch.no_grad():
        assert torch.equal(base.eval()(IDS).logits, load_run(run, config).model(IDS).logits)


def test_transformers_finds_the_base_of_a_live_folder_by_itself(make_run) -> None:
    run, config = make_run(MEMORY, format="live")
    folder = Path(export_run(run, config)["path"])
    # A hub id stands there otherwise; a local folder's name is left out of what is shared.
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": config.model.path}))
    found = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, load_run(run, config).model(IDS).logits)


def test_a_local_base_is_pinned_by_its_weights(make_run, base_folder) -> None:
    run, config = make_run(MEMORY, format="live")
    result = export_run(run, config)
    folder = Path(result["path"])
    assert result["base_sha256"] in (folder / "README.md").read_text()
    exported = open_exported(folder, [f"model.path={config.model.path}", f"data.path={config.data.path}"])
    check_base(exported.config.model, exported.base_sha256, folder)
    other = open_exported(folder, [f"model.path={base_folder('qwen3')}", f"data.path={config.data.path}"])
    with pytest.raises(UserError, match="other weights"):
        check_base(other.config.model, other.base_sha256, folder)


def fake_converter(folder: Path, program: str) -> None:
    file = folder / "convert_hf_to_gguf.py"
    file.write_text(f"#!{sys.executable}\nimport sys\n{program}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


WRITES = "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(sys.argv[sys.argv.index('--outtype') + 1])"


def test_gguf_through_the_converter_that_is_installed(make_run, tmp_path: Path, monkeypatch) -> None:
    run, config = make_run(LoraConfig(r=4), gguf="q8_0")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match="not installed") as caught:
        export_run(run, config)
    assert "llama.cpp" in caught.value.findings[0].fix
    assert not run.export.exists()
    fake_converter(tmp_path, WRITES)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    result = export_run(run, config)
    assert result["gguf"] == {"file": "model-q8_0.gguf", "fidelity": None}
    assert (Path(result["path"]) / "model-q8_0.gguf").read_text() == "q8_0"
    assert "llama-cli -m THIS_FOLDER/model-q8_0.gguf" in (Path(result["path"]) / "README.md").read_text()
    fake_converter(tmp_path, "sys.exit('no such architecture')")
    config.export.force = True
    with pytest.raises(RunFailed, match="no such architecture"):
        export_run(run, config)
    assert (Path(result["path"]) / "model-q8_0.gguf").exists()


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_a_gguf_file_is_measured_through_the_binding(make_run, tmp_path: Path, monkeypatch, noise: float) -> None:
    run, config = make_run(LoraConfig(r=4), gguf="f32", max_kl=0.01)
    fake_converter(tmp_path, WRITES)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))

    class Llama:
        """As the binding's: one row of logits a token."""

        def __init__(self, model_path: str, n_ctx: int, logits_all: bool, verbose: bool) -> None:
            self.model = AutoModelForCausalLM.from_pretrained(Path(model_path).parent)
            self.scores = np.zeros((n_ctx, self.model.config.vocab_size), dtype=np.float32)

        def reset(self) -> None:
            self.scores[:] = 0

        def eval(self, tokens: list[int]) -> None:
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens])).logits[0]
            generator = torch.Generator().manual_seed(0)
            self.scores[: len(tokens)] = logits + noise * torch.randn(logits.shape, generator=generator)

    monkeypatch.setattr("qmemtune.export.gguf.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    if noise:
        with pytest.raises(RunFailed, match=r"mean KL .* above export\.max_kl"):
            export_run(run, config)
        assert list(run.export.iterdir()) == []
        return
    found = export_run(run, config)
    assert found["gguf"]["fidelity"]["kl_mean"] < 1e-6
    report = json.loads((Path(found["path"]) / "fidelity.json").read_text())
    assert report["gguf"]["fidelity"]["rows"] == 6


class FakeHub:
    """The hub's client, as far as an upload needs it."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.calls = fails, {}

    def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
        self.calls["create_repo"] = (repo_id, options)
        return SimpleNamespace(repo_id=f"me/{repo_id}", __str__=lambda self: "https://hub/me")

    def upload_folder(self, **options: object) -> None:
        if self.fails:
            raise OSError("no way")
        self.calls["upload_folder"] = options | {"files": sorted(os.listdir(str(options["folder_path"])))}


def test_uploads_are_private_by_default(make_run, monkeypatch) -> None:
    run, config = make_run(LoraConfig(r=4), format="live", push_to_hub="tuned", license="apache-2.0")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    hub = FakeHub()
    monkeypatch.setattr("qmemtune.export.hub.HfApi", lambda: hub)
    folder = Path(export_run(run, config)["path"])
    assert hub.calls["create_repo"] == ("tuned", {"private": True, "exist_ok": True})
    assert hub.calls["upload_folder"]["repo_id"] == "me/tuned"
    assert {"README.md", "adapter_model.safetensors", "fidelity.json"} <= set(hub.calls["upload_folder"]["files"])
    assert "\nlicense: apache-2.0\n" in (folder / "README.md").read_text()
    for file in folder.iterdir():
        assert b"hf_secret" not in file.read_bytes()
    config.export.push_public = True
    push(folder, config.export, hub)
    assert hub.calls["create_repo"][1]["private"] is False
    with pytest.raises(RunFailed, match="on disk, but was not uploaded"):
        push(folder, config.export, FakeHub(fails=True))
    assert AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("chat", ["always", "auto"])
def test_a_merged_model_ends_where_its_rows_ended(make_run, base_folder, tmp_path, chat: str) -> None:
    """Also where the base ends texts with another token, as base models do."""
    base = tmp_path / "base"
    shutil.copytree(base_folder("llama"), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.bos_token_id}))
    run, config = make_run(LoraConfig(r=4), base_path=base, format="merged", fidelity=False)
    config.data.chat = chat
    file = Path(export_run(run, config)["path"]) / "generation_config.json"
    found = json.loads(file.read_text())["eos_token_id"]
    named = tokenizer.convert_ids_to_tokens(found if isinstance(found, list) else [found])
    assert named == [tokenizer.bos_token, "<|im_end|>"]


def test_a_mixture_ends_where_its_chats_end(make_run, base_folder, tmp_path, rows) -> None:
    """Its sets have forms of their own, and a tokenizer's end of text may be another than a turn's."""
    base = tmp_path / "base"
    shutil.copytree(base_folder("llama"), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    run, config = make_run(LoraConfig(r=4), base_path=base, format="merged", fidelity=False)
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes"}]
    chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    config.data.path = MISSING
    config.data.sources = {"plain": SourceConfig(path=str(rows)), "chats": SourceConfig(path=str(chats))}
    file = Path(export_run(run, config)["path"]) / "generation_config.json"
    named = tokenizer.convert_ids_to_tokens(json.loads(file.read_text())["eos_token_id"])
    assert named == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("format", ["live", "lora"])
def test_a_base_of_a_type_that_nothing_is_merged_into_is_pinned(make_run, base_folder, tmp_path, format: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder("llama"), base)
    _, config = make_run(LoraConfig(r=4), base_path=base, format=format, fidelity=False)
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file)
    digest = weights_digest(resolve(config.model.path, None))
    assert digest is not None
    assert digest != weights_digest(resolve(str(base_folder("llama")), None))
