"""Every file name of a run folder, in one place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qmemtune import __version__
from qmemtune.errors import UserError

RUNS_ROOT = Path("runs")
EXPORT_MARKER = "qmemtune.json"
"""File that marks an exported folder and says what it was made from."""
FORMAT_FILE = "format.json"
"""File of a run folder and of its adapter that says in which format they are; the first one had none."""
RUN_FORMAT, CHECKPOINT_FORMAT, ADAPTER_FORMAT = 2, 2, 2
"""Of what this version writes. 1: resume was an option without section; manifests had no checksums."""


@dataclass(frozen=True)
class RunDir:
    """A run folder: where each thing of a run lies."""

    path: Path

    def __post_init__(self) -> None:
        # No shell replaces a tilde in a recipe, and not every one does after a sign of equality.
        object.__setattr__(self, "path", self.path.expanduser())

    @property
    def config(self) -> Path:
        """The resolved config, YAML."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Package versions, seed, hardware and command line, JSON."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every logged step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sample generations during training, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def logs(self) -> list[Path]:
        """The files that training adds lines to, each line with its step."""
        return [self.metrics, self.samples, self.bad_steps]

    @property
    def rejected(self) -> Path:
        """Rows that were not trained on, with file, line, reason and excerpt."""
        return self.path / "rejected.jsonl"

    @property
    def lock(self) -> Path:
        """Locked by the process that trains into the folder."""
        return self.path / ".lock"

    @property
    def bad_steps(self) -> Path:
        """Steps that were left out because loss or gradient was no number, with their rows, one JSON object a line."""
        return self.path / "bad_steps.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of training checkpoints, ``checkpoint-<step>``."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The final adapter, a PEFT folder with the tokenizer."""
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        """What ``train`` reports, JSON; written last, so its presence marks a finished run."""
        return self.path / "summary.json"

    @property
    def evaluation(self) -> Path:
        """What ``eval`` reports, JSON."""
        return self.path / "eval.json"

    @property
    def inspection(self) -> Path:
        """What ``inspect`` reports, JSON."""
        return self.path / "inspect.json"

    @property
    def inspection_picture(self) -> Path:
        """The same as a picture, PNG."""
        return self.path / "inspect.png"

    @property
    def export(self) -> Path:
        """Default parent of exported folders, ``export/<format>``."""
        return self.path / "export"

    @property
    def distilled(self) -> Path:
        """Folder of the runs that distil this run's memory into a LoRA, one for each choice of settings."""
        return self.path / "distilled"

    @property
    def profile(self) -> Path:
        """Trace of a few training steps, in Chrome's format."""
        return self.path / "profile.json"

    @property
    def tracking(self) -> Path:
        """Files of logging back-ends (TensorBoard events and the like)."""
        return self.path / "tracking"


def run_of_checkpoint(path: Path) -> RunDir:
    """The run in whose folder a checkpoint lies, ``<run>/checkpoints/checkpoint-<step>``."""
    return RunDir(path.expanduser().absolute().parent.parent)


def cache_root() -> Path:
    """Folder of what can be made again: ``$QMEMTUNE_CACHE``, else ~/.cache/qmemtune."""
    root = os.environ.get("QMEMTUNE_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "qmemtune"


def new_run_path(recipe: str, root: Path = RUNS_ROOT, now: datetime | None = None, *, make: bool = False) -> Path:
    """``root/<recipe>/<timestamp>``; a counter is added when that second is taken.

    Args:
        recipe: names the folder above.
        root: of all runs.
        now: the time; the clock's if not given.
        make: make the folder, so that a run that starts in the same second takes another.
    """
    stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    path, number = root / recipe / stamp, 1
    while path.exists() or (make and not made(path)):
        number += 1
        path = root / recipe / f"{stamp}-{number}"
    return path


def made(path: Path) -> bool:
    """Make a folder; False where there is one already."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def find_run(path: str | Path | None, root: Path = RUNS_ROOT) -> RunDir:
    """The run at ``path``, or the newest finished run under ``root``.

    Raises:
        UserError: there is no run there.
    """
    if path is not None:
        run = RunDir(Path(path).expanduser())
        if not run.config.is_file():
            raise _no_run(Path(path))
        check_format(run.path, "run folder", RUN_FORMAT)
        return run
    newest = newest_run(root)
    if newest is None:
        raise UserError(
            "there is no finished run here",
            where=str(root.absolute()),
            fix="train one with `qmemtune train recipe=quickstart`, or name a run folder with run_dir=",
        )
    check_format(newest, "run folder", RUN_FORMAT)
    return RunDir(newest)


def newest_run(root: Path) -> Path | None:
    """The folder of the run under ``root`` that finished last; a run in another run's folder is a part of that one."""
    found = [
        summary
        for summary in root.glob("**/summary.json")
        if _is_run(summary.parent)
        and not any(_is_run(above) for above in summary.parent.parents if root in above.parents)
    ]
    return max(found, key=lambda p: p.stat().st_mtime_ns).parent if found else None


def _is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / "config.yaml").is_file()


def _no_run(path: Path) -> UserError:
    """What stands at ``path`` instead of a run, and which run may be meant."""
    fix = "give the folder that `qmemtune train` printed, such as runs/quickstart/<timestamp>"
    if not path.expanduser().exists():
        return UserError(f"there is no such folder (seen from {Path.cwd()})", where=str(path), fix=fix)
    around = [folder for folder in path.absolute().parents if _is_run(folder)]
    inside = newest_run(path) if path.is_dir() else None
    if around and (around[0] / FORMAT_FILE).is_file():
        fix = f"did you mean {_from_here(around[0])}, the run that it lies in?"
    elif inside is not None:
        fix = f"name one run: the newest in there is {inside}"
    return UserError("not a run folder: it holds no config.yaml", where=str(path), fix=fix)


def _from_here(path: Path) -> Path:
    """A path as it is shorter to write."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def write_format(folder: Path, number: int) -> None:
    """Write in which format a folder is, and by which version."""
    write_json(folder / FORMAT_FILE, {"format": number, "qmemtune": __version__})


def check_format(folder: Path, what: str, known: int) -> None:
    """Refuse a folder that a newer version has written.

    Raises:
        UserError: it is newer, or does not say in which format it is.
    """
    if not (folder / FORMAT_FILE).exists():
        return
    facts = read_json(folder / FORMAT_FILE)
    number = facts.get("format") if isinstance(facts, dict) else None
    if type(number) is not int:
        raise UserError("it does not say which format the folder has", where=str(folder / FORMAT_FILE))
    refuse_newer(what, number, known, str(folder), facts.get("qmemtune"))


def refuse_newer(what: str, found: int, known: int, where: str, written_by: str | None = None) -> None:
    """Refuse what a newer version of this program has written.

    Args:
        what: run folder, checkpoint or adapter.
        found: its format.
        known: the newest format that this version reads.
        where: its folder.
        written_by: the version that wrote it.

    Raises:
        UserError: it is newer.
    """
    if found > known:
        by = f" by qmemtune {written_by}" if written_by else ""
        raise UserError(
            f"the {what} has format {found}, written{by}; this qmemtune {__version__} reads formats up to {known}",
            where=where,
            fix=f"upgrade qmemtune{f' to {written_by} or later' if written_by else ''}: pip install --upgrade qmemtune",
        )


LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What many readers take for the end of a line and JSON leaves as it is: next line, line and paragraph separator."""


def json_line(value: Any, *, allow_nan: bool = True) -> str:
    """A value as JSON on one line, whatever its reader takes for the end of a line, and the line's end."""
    return json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).translate(LINE_ENDS) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text in the same way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file is missing", where=str(path), fix="is this a whole run folder?") from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from None
