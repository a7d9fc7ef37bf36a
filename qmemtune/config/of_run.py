"""A run's own config, with overrides on top: of a finished run for what is done with it, of a started one to go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.compose import Composed, Excused, compose, compose_on, is_data_path
from qmemtune.config.overrides import Overrides, read_overrides
from qmemtune.config.places import shown
from qmemtune.config.renamed import renamed
from qmemtune.config.schema import Config
from qmemtune.config.settings import Setting
from qmemtune.config.values import NULL
from qmemtune.config.yaml_file import read_yaml
from qmemtune.errors import Finding, UserError
from qmemtune.rundir import RUN_FORMAT, RunDir, check_format, run_of_checkpoint

MOVABLE = "adapter.prior_encoder"
"""The only adapter option of a finished run that may be given anew: the folder may have moved, its content is known."""


def load_resolved(path: Path, overrides: Sequence[str], *, needs_data: bool = True) -> Composed:
    """A run's own config with overrides on top.

    The adapter is as it was trained: overrides of its options are refused, save for where its encoder lies.

    Args:
        path: the run's config.yaml.
        overrides: as of :func:`compose`.
        needs_data: whether the files of rows must still be there.

    Raises:
        UserError: with every mistake in the file and the overrides.
    """
    given = read_overrides(overrides)
    start = _own_settings(path, given)
    changed = [f"{group}={option}" for group, option in given.groups.items() if group == "adapter"]
    changed += [
        setting.source for setting in given.settings if setting.key.startswith("adapter.") and setting.key != MOVABLE
    ]
    given.findings.extend(
        Finding("the adapter of a finished run cannot be changed", override, "leave it out, or train again")
        for override in changed
    )
    if given.recipe is not None:
        given.findings.append(
            Finding("a run keeps its recipe", f"recipe={given.recipe}", "leave it out, or give single groups and keys")
        )
    moved = MOVABLE in {setting.key for setting in given.settings}

    def excused(key: str, config: Config) -> bool:
        if key == MOVABLE and not moved and isinstance(config.adapter, QueryableConfig):
            return (RunDir(path.parent).adapter / Path(config.adapter.prior_encoder).name).is_dir()
        return is_data_path(key) and not needs_data

    return compose_on(start, given, False, quiet=shown(path), excused=excused)


def compose_run(overrides: Sequence[str], *, allow_missing: bool = False, needs_data: bool = True) -> Composed:
    """:func:`compose`; a run that has been started and is named without a recipe and a model brings its own config.

    Args:
        overrides: as of :func:`compose`. ``run_dir``, or a checkpoint in ``resume.path``, names the run.
        allow_missing: as of :func:`compose`.
        needs_data: whether a run's files of rows, its base and its encoder's folder must still be there.

    Raises:
        UserError: with every mistake in files and overrides, or nothing says what to train and no run is there.
    """
    given = read_overrides(overrides)
    path = _started_run(given)
    if path is None or not path.is_file():
        saying = [setting.key for setting in given.settings if setting.key != "run_dir"]
        if path is not None and not given.groups and ("resume.path" in saying or not saying):
            raise UserError(
                f"there is no run: no {path.name} is there",
                where=shown(path.parent),
                fix="name a run's folder with run_dir=, or say what to train with recipe=NAME or model.path=",
            )
        return compose(overrides, allow_missing=allow_missing)
    check_format(path.parent, "run folder", RUN_FORMAT)
    # The folder may have been moved since, and whether to go on is for this command line to say.
    start = [setting for setting in _own_settings(path, given) if not setting.key.startswith(("run_dir", "resume."))]
    excused: Excused | None = None if needs_data else _places_may_be_gone
    return compose_on(start, given, allow_missing, quiet=shown(path), excused=excused)


def _own_settings(path: Path, given: Overrides) -> list[Setting]:
    """What a run's config.yaml sets; what is wrong with the file is added to the overrides' mistakes."""
    file = read_yaml(path)
    given.findings.extend(file.findings)
    return renamed(file.settings)


def _places_may_be_gone(key: str, config: Config) -> bool:
    return is_data_path(key) or key in (MOVABLE, "model.path")


def _started_run(given: Overrides) -> Path | None:
    """Where the config.yaml of the run is that a command line names, if it does not itself say what to train."""
    if given.recipe is not None or "model" in given.groups or "model.path" in {s.key for s in given.settings}:
        return None
    values = {setting.key: None if setting.reset else str(setting.value) for setting in given.settings}
    run_dir, checkpoint = (_named(values.get(key)) for key in ("run_dir", "resume.path"))
    run = None if run_dir is None else RunDir(Path(run_dir)).config
    if checkpoint in (None, "auto"):
        return run
    # Another run_dir beside a checkpoint is that of a new run, which goes on as the checkpoint's own would.
    own = run_of_checkpoint(Path(checkpoint)).config
    return own if run is None or own.is_file() else run


def _named(text: str | None) -> str | None:
    return None if text is None or text.lower() in NULL | {""} else text
