"""Logging back-ends: checked before anything is loaded, and pointed at the run folder."""

from __future__ import annotations

import importlib.util
import os

from qmemtune.config.schema import TrackingConfig
from qmemtune.errors import Finding, UserError
from qmemtune.rundir import RunDir

FOLDERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR", "trackio": "TRACKIO_DIR"}
"""Back-end -> the environment variable that says where it keeps its files."""


def check_backends(config: TrackingConfig) -> None:
    """Make sure that the packages are installed.

    Raises:
        UserError: names each one that is missing.
    """
    missing = [
        Finding(f"{name} is not installed", "tracking.backends", "install it with pip install 'qmemtune[tracking]'")
        for name in config.backends
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError.many(missing)


def use_folder(config: TrackingConfig, run: RunDir) -> None:
    """Let the back-ends write into the run folder, unless the user's environment says where."""
    for name in config.backends:
        run.tracking.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(FOLDERS[name], str(run.tracking))
    if "wandb" in config.backends:
        os.environ.setdefault("WANDB_PROJECT", config.project)
