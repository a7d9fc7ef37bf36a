"""Which run, or which bare model, a verb is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qmemtune.cli.output import Output
from qmemtune.config.values import from_text
from qmemtune.errors import UserError
from qmemtune.rundir import EXPORT_MARKER, RunDir, find_run

if TYPE_CHECKING:
    from qmemtune.config.compose import Composed


def split_run_dir(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of the last ``run_dir=``, and the other overrides."""
    return take("run_dir", overrides)


def take(key: str, overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of the last override of a key, and all overrides of other keys."""
    value, rest = None, []
    for override in overrides:
        if override.removeprefix("+").startswith(f"{key}="):
            value = from_text(override.removeprefix("+").removeprefix(f"{key}="), str)
        else:
            rest.append(override)
    return value, rest


def with_run_dir(arguments: Sequence[str]) -> list[str]:
    """The arguments with a bare run folder written as ``run_dir=``.

    Raises:
        UserError: more than one run is named.
    """
    folders = [a for a in arguments if _is_bare(a)]
    rest = [a for a in arguments if a not in folders]
    named = folders + [a.partition("=")[2] for a in rest if a.removeprefix("+").startswith("run_dir=")]
    if len({Path(name).expanduser().resolve() for name in named}) > 1:
        raise UserError(f"{len(named)} runs are named: {', '.join(named)}", fix="name one run folder")
    return [f"run_dir={folder}" for folder in folders] + rest


def with_folder(arguments: Sequence[str]) -> list[str]:
    """The same where the folder may also be an exported one, which becomes ``export.path=``.

    Raises:
        UserError: more than one run, or more than one exported folder, is named.
    """
    exported = [a for a in arguments if _is_bare(a) and (Path(a).expanduser() / EXPORT_MARKER).is_file()]
    if len(exported) > 1:
        raise UserError(f"{len(exported)} exported folders are named: {', '.join(exported)}", fix="name one")
    return [f"export.path={a}" for a in exported] + with_run_dir([a for a in arguments if a not in exported])


def _is_bare(argument: str) -> bool:
    """Whether an argument is a folder's name and no override, whose key holds no slash."""
    before, equals, _ = argument.partition("=")
    named = not equals or "/" in before
    return named and (argument.startswith("~/") or not argument.startswith(("+", "~")))


def split_export(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The exported folder that overrides speak of, and the other overrides.

    It is named by ``export.path=``, or by ``model.path=`` if it has a marker. A recipe brings its own settings, so that
    with ``recipe=`` a ``model.path=`` is a model like any other.

    Raises:
        UserError: a run is named too.
    """
    path, rest = take("export.path", overrides)
    if path is not None:
        run_dir, _ = split_run_dir(overrides)
        if run_dir is not None:
            raise UserError(
                "a run and an exported folder are given", where=f"export.path={path}", fix="leave one of them out"
            )
        return Path(path).expanduser(), rest
    path, rest = take("model.path", overrides)
    if path is None or any(override.startswith(("run_dir=", "recipe=")) for override in rest):
        return None, list(overrides)
    folder = Path(path).expanduser()
    if not (folder / EXPORT_MARKER).is_file():
        return None, list(overrides)
    return folder, [override for override in rest if override != "model=local"]


def names_bare_model(overrides: Sequence[str]) -> bool:
    """Whether overrides speak of a model by itself and not of a run."""
    if split_run_dir(overrides)[0] is not None:
        return False
    return any(override.startswith(("recipe=", "model=", "model.path=")) for override in overrides)


def refuse_adapter(path: str) -> None:
    """Refuse a folder that holds an adapter where a whole model is meant.

    Raises:
        UserError: it does.
    """
    if (Path(path).expanduser() / "adapter_config.json").is_file():
        raise UserError(
            "this folder holds an adapter, not a whole model",
            where=path,
            fix="name its run with run_dir=, or export it with export.format=merged",
        )


def load_target(overrides: Sequence[str], out: Output, *, needs_data: bool = True) -> tuple[RunDir, Composed]:
    """The run that ``run_dir=`` names, or the newest one (and says which), with its config and the other overrides.

    Args:
        overrides: the command line's.
        out: where to say which run.
        needs_data: whether the files of rows must still be there.

    Raises:
        UserError: there is no such run, or the overrides are wrong.
    """
    from qmemtune.config.of_run import load_resolved

    run_dir, rest = split_run_dir(overrides)
    run = find_run(run_dir)
    if run_dir is None:
        out.note(f"run: {run.path} (the newest)")
    composed = load_resolved(run.config, rest, needs_data=needs_data)
    out.warn(composed.warnings)
    return run, composed
