"""Logging back-ends: checked before anything is loaded, and pointed at the run folder."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qmemtune.config.schema import TrackingConfig
from qmemtune.credentials import hide
from qmemtune.errors import Finding, UserError
from qmemtune.rundir import RunDir

FOLDERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "wandb": "WANDB_DIR", "trackio": "TRACKIO_DIR"}
"""Back-end -> the environment variable that says where it keeps its files."""


_set_here: set[str] = set()
"""What earlier runs of this process put into the environment, which is not the user's word."""


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
        _say(FOLDERS[name], str(run.tracking))
    if "wandb" in config.backends:
        # What a config says comes before the environment, which comes before the project's default.
        _say("WANDB_PROJECT", config.project, over_all=config.project != TrackingConfig.project)


def _say(variable: str, value: str, *, over_all: bool = False) -> None:
    """Set a variable of the environment; the user's own stays, unless over all."""
    if over_all or os.environ.get(variable) in (None, *_set_here):
        os.environ[variable] = value
        _set_here.add(value)


class Backend(TrainerCallback):
    """A logging back-end that cannot stop the run: after its first error it is left alone.

    Args:
        inner: the back-end's own callback.
        tell: is told of that error.
    """

    def __init__(self, inner: TrainerCallback, tell: Callable[[str], None]) -> None:
        self.inner: TrainerCallback | None = inner
        self.name = type(inner).__name__.removesuffix("Callback").lower()
        self.tell = tell

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Give an event to the back-end."""
        if self.inner is None:
            return None
        try:
            return getattr(self.inner, event)(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a service or its client raises, training goes on
            self.inner = None
            text = hide(" ".join(str(error).split()))
            self.tell(
                f"warning: tracking with {self.name} failed and is switched off for this run "
                f"({type(error).__name__}: {text}); metrics.jsonl goes on"
            )
            return None


def _passing_on(event: str) -> Callable[..., Any]:
    def handle(self: Backend, *args: Any, **kwargs: Any) -> Any:
        return self.pass_on(event, *args, **kwargs)

    return handle


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Backend, _event, _passing_on(_event))


def guard_backends(callbacks: list[TrainerCallback], tell: Callable[[str], None]) -> None:
    """Wrap the callbacks of logging back-ends in place."""
    for index, callback in enumerate(callbacks):
        if type(callback).__module__.startswith("transformers.integrations"):
            callbacks[index] = Backend(callback, tell)
