"""Opens a run folder: a new one, or one whose run goes on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qmemtune.config.schema import Config
from qmemtune.credentials import hide
from qmemtune.engine.checkpoints import checked, found_checkpoints, newest_complete
from qmemtune.engine.lock import refuse_if_in_use
from qmemtune.engine.manifest import Checkpoint
from qmemtune.errors import UserError
from qmemtune.models.hardware import compute_dtype
from qmemtune.rundir import FORMAT_FILE, RUN_FORMAT, RunDir, check_format, new_run_path, read_json, run_of_checkpoint


@dataclass(frozen=True)
class Opened:
    """Where a run writes, and from where it goes on."""

    run: RunDir
    checkpoint: Checkpoint | None
    """None: training starts at step 0."""
    notes: list[str]
    """What the user should know about the choice."""


def open_run(config: Config, *, make: bool = False) -> Opened:
    """Choose the run folder and the checkpoint to go on from.

    Args:
        config: the run.
        make: make a folder whose name the config does not give, so that no other run takes the same; else nothing is
            written.

    Raises:
        UserError: the folder holds another run or is in use, or there is nothing to resume from.
    """
    if config.run_dir is not None:
        check_format(RunDir(Path(config.run_dir)).path, "run folder", RUN_FORMAT)
    opened = choose(config, make)
    refuse_if_in_use(opened.run)
    return opened


def choose(config: Config, make: bool) -> Opened:
    """The same without looking for other processes."""
    if config.resume.path is None:
        return Opened(new_folder(config, make), None, [])
    if config.resume.path == "auto":
        return newest(config)
    checkpoint = checked(Path(config.resume.path).expanduser())
    own = run_of_checkpoint(checkpoint.path)
    if config.run_dir and Path(config.run_dir).expanduser().resolve() != own.path.resolve():
        return Opened(new_folder(config, make), checkpoint, [])
    if not config.run_dir and not own.config.is_file():
        raise UserError(
            "the checkpoint does not lie in a run folder",
            where=config.resume.path,
            fix="add run_dir=FOLDER for the new run",
        )
    return Opened(RunDir(Path(config.run_dir).expanduser()) if config.run_dir else own, checkpoint, [])


def new_folder(config: Config, make: bool) -> RunDir:
    """The folder of a run that starts at step 0, or from another run's checkpoint."""
    if config.run_dir is None:
        return RunDir(new_run_path(config.recipe, make=make))
    run = RunDir(Path(config.run_dir).expanduser())
    again = "choose another run_dir, or add resume=auto to go on with it"
    if run.path.exists() and not run.path.is_dir():
        raise UserError("run_dir is a file", where=str(run.path), fix="name a folder")
    above = next((parent for parent in run.path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise UserError(f"run_dir lies in {above}, which is a file", where=str(run.path), fix="name another folder")
    if run.summary.is_file():
        raise UserError("run_dir holds a finished run", where=str(run.path), fix=again)
    if found_checkpoints(run.checkpoints):
        raise UserError("run_dir holds checkpoints of an unfinished run", where=str(run.path), fix=again)
    refuse_foreign(run)
    return run


def refuse_foreign(run: RunDir) -> None:
    """Raise UserError for a folder that no run has made, and that holds what one would replace."""
    # Runs of the first format did not say which one it was.
    if (run.path / FORMAT_FILE).is_file() or (run.config.is_file() and run.environment.is_file()):
        return
    replaced = (run.config, run.environment, run.adapter, run.checkpoints, *run.logs)
    foreign = [path.name for path in replaced if path.exists()]
    if foreign:
        raise UserError(
            f"run_dir is no run's folder, and holds {', '.join(foreign)}, which a run would replace",
            where=str(run.path),
            fix="choose another run_dir, or move what is there",
        )


def newest(config: Config) -> Opened:
    """``resume=auto``: the newest complete checkpoint of run_dir."""
    if config.run_dir is None:
        raise UserError(
            "resume=auto needs to know which run to go on with",
            where="resume",
            fix="add run_dir=runs/<recipe>/<timestamp>, or name a checkpoint folder with resume=",
        )
    run = RunDir(Path(config.run_dir).expanduser())
    found, damaged = newest_complete(run.checkpoints)
    if found is not None:
        passed = [f"warning: passed over {finding.where}: {finding.problem}" for finding in damaged]
        return Opened(run, found, [*passed, f"going on from {found.path}"])
    if damaged:
        # Starting anew is not what was asked for while one may still be repaired.
        way = f"put a whole copy of one in its place, or delete {run.checkpoints} to start at step 0"
        raise UserError.many([replace(finding, fix=way) for finding in damaged])
    refuse_foreign(run)
    return Opened(run, None, [f"no checkpoint in {run.checkpoints}: starting at step 0"])


def run_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type of a run's arithmetic. One that goes on keeps the type it began with: what is fast is measured, and a
    busy machine may find something else.

    Raises:
        UserError: the type cannot be had on this device.
    """
    setting: str = config.model.compute_dtype
    path = config.resume.path
    if setting == "auto" and path is not None:
        begun = RunDir(Path(config.run_dir or "")) if path == "auto" else run_of_checkpoint(Path(path))
        setting = recorded_dtype(begun) or setting
    return compute_dtype(setting, device)


def recorded_dtype(run: RunDir) -> str | None:
    """The type in which a run computed; None where it does not say."""
    try:
        facts = read_json(run.environment)
    except UserError:
        return None
    found = facts.get("dtype") if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None


def resume_command(arguments: list[str], run: RunDir) -> str:
    """The command that goes on with an interrupted run.

    Args:
        arguments: the command line of this process, ``sys.argv``.
        run: its folder.
    """
    kept = [a for a in arguments[1:] if not a.startswith(("run_dir=", "resume=", "resume.path="))]
    if kept[:1] != ["train"]:
        # Not started by the command line's verb (a script, a test): the folder has the config.
        kept = ["train"]
    words = ["qmemtune", *kept, f"run_dir={run.path}", "resume=auto"]
    return hide(" ".join(shlex.quote(word) for word in words))
