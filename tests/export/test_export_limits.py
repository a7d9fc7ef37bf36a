"""What is too far from the live model is refused; which formats are exact can be asked before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.dump import to_yaml
from qmemtune.config.of_run import load_resolved
from qmemtune.errors import RunFailed
from qmemtune.export import export_run
from qmemtune.export.exactness import plan

FAR = QueryableConfig(r=4, num_atoms=3, key_dim=4, block_size=2, temperature=50.0, init_core_std=2.0)


def test_an_export_too_far_is_refused_unless_forced(make_run) -> None:
    run, config = make_run(FAR, format="lora", max_kl=1e-4)
    with pytest.raises(RunFailed, match=r"mean KL .* above export\.max_kl") as caught:
        export_run(run, config)
    assert caught.value.exit_code == 1
    assert "export.format=live is exact" in caught.value.findings[0].fix
    assert list(run.export.iterdir()) == []
    config.export.force = True
    result = export_run(run, config)
    assert result["forced"] is True
    assert "Kept by force" in (Path(result["path"]) / "README.md").read_text()
    report = json.loads((Path(result["path"]) / "fidelity.json").read_text())
    assert report["forced"] is True
    assert report["kl_mean"] == result["fidelity"]["kl_mean"] > 1e-4
    assert report["kl_max"] >= report["kl_mean"]
    assert 0 <= report["same_token"] <= 1
    assert report["limits"]["max_kl"] == 1e-4


def test_a_loss_too_high_is_refused(make_run) -> None:
    run, config = make_run(FAR, format="lora", max_loss_increase=-1000.0)
    with pytest.raises(RunFailed, match="held-out loss rises"):
        export_run(run, config)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_the_default_limits_let_a_lora_merge_pass(make_run, kind: str) -> None:
    result = export_run(*make_run(LoraConfig(r=4), kind=kind, max_kl=0.05, max_loss_increase=0.05))
    assert result["forced"] is False
    assert result["fidelity"]["same_token"] == 1.0


def test_auto_measures_both_bases_and_says_which(make_run) -> None:
    run, config = make_run(LoraConfig(r=4), kind="nf4", base="auto", max_kl=1e-3)
    found = export_run(run, config)["base"]
    assert found["base"] == "dequantized"  # the other is over the limit
    assert found["dequantized"]["kl_mean"] < 1e-6 < found["original"]["kl_mean"]
    run, config = make_run(LoraConfig(r=4), kind="nf4", base="original")
    result = export_run(run, config)
    assert result["exact"] is False
    assert result["base"] == {"base": "original"}
    assert result["fidelity"]["kl_mean"] > 1e-3


def test_plan_says_what_is_exact(make_run) -> None:
    def kinds(*args, **options) -> dict[str, str]:
        planned = plan(*make_run(*args, **options))
        return {form: found["kind"] for form, found in planned["formats"].items()}

    assert kinds(LoraConfig(r=2), kind="nf4") == {"live": "exact", "lora": "exact", "merged": "exact"}
    assert kinds(LoraConfig(r=2), kind="nf4", base="original")["merged"] == "approximate"
    assert kinds(LoraConfig(r=2), kind="int8")["merged"] == "approximate"
    assert kinds(FAR) == {"live": "exact", "lora": "approximate", "merged": "approximate"}
    run, config = make_run(FAR)
    (run.adapter / "adapter_config.json").unlink()
    assert {found["kind"] for found in plan(run, config)["formats"].values()} == {"impossible"}


def test_plan_says_what_would_be_written_where(make_run, tmp_path: Path) -> None:
    run, config = make_run(FAR, format="lora", fold="mean", rank=64)
    asked = plan(run, config)["export"]
    assert asked == {
        "format": "lora",
        "path": str(run.export / "lora"),
        "taken": False,
        "fold": "mean",
        "rank": config.adapter.r,
    }
    run, config = make_run(FAR, kind="nf4", fold="distill", rank=64, path=str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    asked = plan(run, config)["export"]
    assert (asked["path"], asked["taken"], asked["rank"]) == (str(tmp_path / "there"), True, 64)
    assert asked["base"] == config.export.base
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["notes.txt"]
    assert "fold" not in plan(*make_run(LoraConfig(r=2)))["export"]


def test_configs_of_earlier_versions_load(make_run, tmp_path: Path) -> None:
    _, config = make_run(FAR)
    text = to_yaml(config).replace("format: merged", "format: adapter").replace("force: false", "overwrite: true")
    (tmp_path / "config.yaml").write_text(text)
    export = load_resolved(tmp_path / "config.yaml", []).config.export
    assert (export.format, export.force, export.is_live) == ("adapter", True, True)
