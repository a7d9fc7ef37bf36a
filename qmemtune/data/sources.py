"""Where rows come from: files, folders, hub data sets, generators."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from qmemtune.config.paths import is_glob
from qmemtune.config.splits import SPLITS, begins_like_split, names_split
from qmemtune.data.files import FAULTS, kind_of_file
from qmemtune.data.jsonfiles import read_json, read_jsonl
from qmemtune.data.records import RawRow, Rejected
from qmemtune.data.tables import read_arrow, read_csv, read_parquet
from qmemtune.errors import UserError, first_line

Reader = Callable[[Path], Iterator[RawRow | Rejected]]

READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
GENERATED = "generated:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HELD_OUT = ("test", "valid", "eval")
SPLIT_WORDS = [name for names in SPLITS.values() for name in names]


def read_rows(
    path: str, *, name: str | None = None, split: str = "train", streaming: bool = False
) -> Iterator[RawRow | Rejected]:
    """Every row of ``path``, as found, with those that cannot be read.

    Args:
        path: a data file, a glob, a folder of data files or of ``datasets.save_to_disk``, or a hub data set id.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        streaming: read a hub data set over the network as rows are asked for, without storing it.

    Raises:
        UserError: there is no such source, or it is not readable as a whole.
    """
    local = Path(path).expanduser()
    try:
        files = local_files(path, split)
        if files is not None:
            return (row for file in files for row in as_user_errors(reader_for(file)(file), str(file)))
        if local.is_dir():
            return read_saved(local, split)
    except OSError as error:  # a name too long for the file system, a folder that may not be listed
        raise UserError(f"cannot be read: {error.strerror or error}", where=f"data path {path}") from error
    return read_hub(path, name, split, streaming)


def local_files(path: str, split: str) -> list[Path] | None:
    """The files that a local path stands for; None for a saved data set and for what is not here.

    Raises:
        UserError: a glob fits no file, a folder holds none for the split, or a file is of no known kind.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return None if is_saved(local) else folder_files(local, split)
    if local.is_file():
        reader_for(local)
        return [local]
    if is_glob(path):
        found = sorted(Path(name) for name in glob.glob(str(local), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError("no file fits the pattern", where=f"data path {path}", fix=f"it is seen from {Path.cwd()}")
        for file in found:
            reader_for(file)
        return found
    return None


def is_saved(folder: Path) -> bool:
    """Whether a folder is one of ``datasets.save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def as_user_errors(rows: Iterator[RawRow | Rejected], path: str) -> Iterator[RawRow | Rejected]:
    try:
        yield from rows
    except FAULTS as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from error


def reader_for(path: Path) -> Reader:
    reader = READERS.get(kind_of_file(path))
    if reader is None:
        raise UserError(
            f"the ending {path.suffix or '(none)'} names no known kind of file",
            where=str(path),
            fix=f"rename or convert it to one of {', '.join(READERS)}",
        )
    return reader


def looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or kind_of_file(Path(path)) in READERS or "\\" in path


def nearest_file(path: Path) -> str:
    """What to do about a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either: check the path (relative to {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"did you mean {folder / near[0]}?" if near else f"check the path (relative to {Path.cwd()})"


def folder_files(folder: Path, split: str) -> list[Path]:
    """Data files of a folder: those whose names say the split, else all."""
    files = data_files(folder)
    if not files:
        raise UserError(
            "the folder holds no data file", where=str(folder), fix=f"put files ending in {', '.join(READERS)} there"
        )
    named = [file for file in files if names_split(file.stem, split)]
    if not named:
        other_names = next((names for names in SPLITS.values() if split.lower() in names), ())
        named = [file for file in files if names_split(file.stem, *other_names)]
    # One that begins like a split may mean something else; next to one for training it does not.
    apart = [any(begins_like_split(file.stem, *names) for file in files) for names in (["train"], HELD_OUT)]
    if not named and (all(apart) or any(names_split(file.stem, *SPLIT_WORDS) for file in files)):
        raise UserError(
            f"no file of the folder is named after the split '{split}': {', '.join(file.name for file in files)}",
            where=str(folder),
            fix="name the file itself in data.path, or set data.split (data.eval_split)",
        )
    return named or files


def data_files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if kind_of_file(entry) in READERS and entry.is_file())


def lacks_splits(path: str, split: str) -> str | None:
    """Why the rows at a path are in no splits, of which ``split`` would be one; None where they may be."""
    local = Path(path).expanduser()
    try:
        if local.is_file():
            return "a file has no splits"
        if not local.is_dir():
            return "a pattern has no splits" if is_glob(path) else None
        if is_saved(local):
            return None if (local / "dataset_dict.json").is_file() else "the data set was saved without splits"
        files = data_files(local)
        if not files or any(names_split(file.stem, split, *SPLIT_WORDS) for file in files):
            return None
    except OSError:  # left to who reads the rows
        return None
    return "no file of the folder is named after a split"


def read_saved(folder: Path, split: str) -> Iterator[RawRow | Rejected]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"not a readable saved data set: {first_line(error)}", where=str(folder)) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(
                f"there is no split '{split}'",
                where=str(folder),
                fix=f"data.split (data.eval_split): one of {', '.join(saved)}",
            )
        saved = saved[split]
    return table_rows(saved, str(folder))


@cache
def load_hub(path: str, name: str | None, split: str, streaming: bool) -> Any:
    """A hub data set, downloaded once."""
    import datasets

    return datasets.load_dataset(path, name, split=split, streaming=streaming)


def hub_fingerprint(path: str, name: str | None, split: str) -> str:
    """What ``datasets`` calls this state of a hub data set.

    Raises:
        UserError: it cannot be had.
    """
    return str(getattr(hub_dataset(path, name, split, False), "_fingerprint", path))


def hub_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
    """A hub data set.

    Raises:
        UserError: it cannot be had.
    """
    import datasets

    if looks_local(path) or not HUB_ID.fullmatch(path):
        raise UserError("no such file or folder", where=f"data path {path}", fix=nearest_file(Path(path).expanduser()))
    try:
        return load_hub(path, name, split, streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the hub data set cannot be loaded: {first_line(error)}",
            where=f"data path {path}" + (f" (configuration {name})" if name else "") + f", split {split}",
            fix="check the id, data.name and data.split and the network (HF_HUB_OFFLINE must not be set), "
            "or give a local file",
        ) from error


def read_hub(path: str, name: str | None, split: str, streaming: bool) -> Iterator[RawRow | Rejected]:
    loaded = hub_dataset(path, name, split, streaming)
    return streamed_rows(loaded, path) if streaming else table_rows(loaded, path)


def streamed_rows(dataset: Any, name: str) -> Iterator[RawRow | Rejected]:
    """Rows of a ``datasets.IterableDataset``."""
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        for row in dataset:
            number += 1
            yield RawRow(dict(row), name, number)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"streaming stopped: {first_line(error)}",
            where=f"data path {name}, after row {number}",
            fix="try again, or download it with data.streaming=false",
        ) from error


def table_rows(dataset: Any, name: str) -> Iterator[RawRow | Rejected]:
    """Rows of a ``datasets.Dataset``, read from its arrow table: images and sounds are not decoded."""
    number = 0
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for row in table.to_pylist():
            number += 1
            yield RawRow(row, name, number)


def generated_rows(path: str) -> tuple[list[RawRow], list[RawRow]]:
    """Training and held-out rows of ``generated:NAME``.

    Raises:
        UserError: there is no such generator.
    """
    from qmemtune.data.generated import GENERATED as GENERATORS

    name = path.removeprefix(GENERATED)
    if name not in GENERATORS:
        near = difflib.get_close_matches(name, GENERATORS, n=1)
        raise UserError(
            f"there is no generated data set '{name}'",
            where=f"data path {path}",
            fix=f"did you mean {GENERATED}{near[0]}?" if near else f"one of {', '.join(sorted(GENERATORS))}",
        )
    train, heldout = GENERATORS[name]()
    return numbered(train, f"{path}/train"), numbered(heldout, f"{path}/heldout")


def numbered(rows: Iterable[dict[str, Any]], file: str) -> list[RawRow]:
    return [RawRow(values, file, number) for number, values in enumerate(rows, start=1)]
