"""Where configs lie: the tool's own folders, the user's, and what is in them."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Literal

import qmemtune
from qmemtune.errors import UserError

SUFFIX = ".yaml"


def own_folder(name: Literal["conf", "recipes"]) -> Path:
    """The tool's own ``conf`` or ``recipes``: inside the installed package, or at the top of a source checkout.

    Raises:
        UserError: neither exists; the installation is broken.
    """
    package = Path(qmemtune.__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(f"the installation has no {name} folder", where=str(package), fix="install qmemtune again")


def folders(name: Literal["conf", "recipes"]) -> list[Path]:
    """The folders of that name in order of precedence: the user's ``./conf`` or ``./recipes``, then the tool's own."""
    user = (Path.cwd() / name).resolve()
    own = own_folder(name)
    return [user, own] if user.is_dir() and user != own else [own]


def search_path(recipe: Path | None) -> list[Path]:
    """Where a config that a defaults list names is looked for; earlier folders win.

    The recipe's own folder, the user's and the tool's ``conf``, and last the folders of recipes, so that a recipe can
    build on another one by its name.
    """
    found: list[Path] = [] if recipe is None else [recipe.resolve().parent]
    for folder in [*folders("conf"), *folders("recipes")]:
        if folder not in found:
            found.append(folder)
    return found


def list_recipes() -> dict[str, Path]:
    """Recipe names and their files; a user's recipe hides the tool's own of the same name."""
    found: dict[str, Path] = {}
    for folder in folders("recipes"):
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            found.setdefault(path.stem, path)
    return found


def is_own(path: Path) -> bool:
    """Whether a file belongs to the tool and not to the user."""
    return any(folder in path.resolve().parents for folder in (own_folder("conf"), own_folder("recipes")))


def list_groups() -> list[str]:
    """Names of the config groups: the folders in every ``conf``."""
    return sorted({entry.name for folder in folders("conf") for entry in folder.iterdir() if entry.is_dir()})


def list_options(group: str, where: list[Path] | None = None) -> list[str]:
    """Names of a group's options."""
    names = {
        path.relative_to(folder / group).with_suffix("").as_posix()
        for folder in (where if where is not None else folders("conf"))
        for path in (folder / group).glob(f"**/*{SUFFIX}")
    }
    return sorted(names)


def find_config(name: str, where: list[Path]) -> Path | None:
    """The file of the config ``group/option`` (or ``option``) in the first folder that has it."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        # A config is looked for in its folders and nowhere else.
        return None
    for folder in where:
        path = folder / f"{name}{SUFFIX}"
        if path.is_file():
            return path
    return None


def shown(path: Path) -> str:
    """A path as messages show it: relative to the working folder where it lies in there."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
