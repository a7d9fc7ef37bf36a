"""Which run, or which bare model, a verb is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmemtune.cli.output import Output
from qmemtune.rundir import RunDir, find_run

if TYPE_CHECKING:
    from qmemtune.config.compose import Composed


def split_run_dir(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of the last ``run_dir=``, and the other overrides."""
    run_dir, rest = None, []
    for override in overrides:
        if override.startswith("run_dir="):
            run_dir = override.removeprefix("run_dir=").strip("'\"")
        else:
            rest.append(override)
    return run_dir, rest


def names_bare_model(overrides: Sequence[str]) -> bool:
    """Whether overrides without a ``run_dir=`` speak of a model by itself and not of a run."""
    return any(override.startswith(("recipe=", "model=", "model.path=")) for override in overrides)


def load_target(overrides: Sequence[str], out: Output) -> tuple[RunDir, Composed]:
    """The run that ``run_dir=`` names, or the newest one (and says which), with its config and the other overrides.

    Raises:
        UserError: there is no such run, or the overrides are wrong.
    """
    from qmemtune.config.compose import load_resolved

    run_dir, rest = split_run_dir(overrides)
    run = find_run(run_dir)
    if run_dir is None:
        out.note(f"run: {run.path} (the newest)")
    composed = load_resolved(run.config, rest)
    out.warn(composed.warnings)
    return run, composed
