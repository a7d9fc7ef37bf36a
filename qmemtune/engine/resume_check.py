"""Proves on a run of the user's that resuming is exact: replays recorded steps elsewhere and compares."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from qmemtune.config.compose import Composed
from qmemtune.config.schema import Config, ResumeConfig, TrackingConfig
from qmemtune.engine.checkpoints import complete_checkpoints
from qmemtune.engine.compare import logged_lines, same_content
from qmemtune.engine.folder import recorded_dtype
from qmemtune.engine.manifest import Checkpoint
from qmemtune.engine.progress import SilentProgress
from qmemtune.engine.run import train
from qmemtune.errors import UserError
from qmemtune.rundir import RunDir

STATE = ("adapter_model.safetensors", "best_weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""Files of a checkpoint from which everything after it follows."""
COMPARED = ("train", "evaluation", "routes")
"""Events of the log that follow from training; a warning may come of a tracking service or a touched file."""
SHOWN_DIFFERENCES = 20


@dataclass(frozen=True)
class Replay:
    """Which steps are made again."""

    start: int
    end: int
    checkpoint: Checkpoint | None
    """Of step ``start``; None: from the beginning, with a checkpoint of the check's own in the middle."""
    goal: Checkpoint | None
    """The recorded one of step ``end``, if there is one."""

    @property
    def middle(self) -> int | None:
        """Step of the check's own checkpoint."""
        return None if self.checkpoint or self.end < 2 else self.end // 2


@dataclass
class Told(SilentProgress):
    """Keeps what a replay says about changes."""

    say: Callable[[str], None]
    messages: list[str] = field(default_factory=list)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A replay takes as long as the steps did: say that it gets on."""
        self.say(f"replayed step {metrics['step']}")

    def message(self, text: str) -> None:
        # The replay itself switches tracking off.
        if text.removeprefix("warning: ").startswith("since checkpoint-") and " tracking." not in text:
            self.messages.append(text)


def resume_check(
    run: RunDir, composed: Composed, *, steps: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Replay steps of a run in a folder that is removed afterwards, and compare them with what the run recorded.

    Args:
        run: the run; nothing in its folder is changed.
        composed: its config.
        steps: replay so many optimizer steps at most.
        say: told how far the replay is.

    Returns:
        ``run_dir``, ``from_step``, ``to_step``, ``checkpoint`` (path, or None for a replay from the beginning),
        ``own_checkpoint_step``, ``changes`` (since the checkpoint), ``compared`` (counts of ``losses``,
        ``grad_norms``, ``evaluations`` and names of ``files``), ``differences`` and ``exact``.

    Raises:
        UserError: the run recorded nothing that can be replayed, or it cannot be trained here.
    """
    replay = choose(complete_checkpoints(run.checkpoints), logged_lines(run.metrics), run, steps)
    told = Told(say)
    begin = f"from {replay.checkpoint.path}" if replay.checkpoint else "from the beginning"
    say(f"replaying steps {replay.start + 1} to {replay.end} {begin} ...")
    with tempfile.TemporaryDirectory(prefix="qmemtune-resume-check-") as folder:
        again = RunDir(Path(folder) / "run")
        make_again(replay, composed.config, run, again, told)
        recorded = within(logged_lines(run.metrics), replay)
        replayed = within(logged_lines(again.metrics), replay)
        differences = compare_lines(recorded, replayed)
        files: list[str] = []
        if replay.goal is not None:
            files = [name for name in STATE if name in replay.goal.files]
            made = again.checkpoints / replay.goal.path.name
            differences += [
                f"step {replay.end}: {name} is another"
                for name in files
                if not same_content(replay.goal.path / name, made / name)
            ]
    return {
        "run_dir": str(run.path),
        "from_step": replay.start,
        "to_step": replay.end,
        "checkpoint": str(replay.checkpoint.path) if replay.checkpoint else None,
        "own_checkpoint_step": replay.middle,
        "changes": told.messages,
        "compared": {
            "losses": sum("loss" in line and line["event"] == "train" for line in recorded),
            "grad_norms": sum("grad_norm" in line for line in recorded),
            "evaluations": sum(line["event"] == "evaluation" for line in recorded),
            "files": files,
        },
        "differences": differences,
        "exact": not differences,
    }


def choose(found: list[Checkpoint], lines: list[dict[str, Any]], run: RunDir, steps: int) -> Replay:
    """The steps to replay: between two checkpoints if possible, else after one, else from the beginning.

    Args:
        found: the run's complete checkpoints.
        lines: its log.
        run: for messages.
        steps: so many at most, or up to the first thing that can be compared.

    Raises:
        UserError: there is nothing to compare with, or the run had several processes.
    """
    if any(checkpoint.world_size > 1 for checkpoint in found):
        raise UserError(
            f"the run had {found[-1].world_size} processes, and this check has one",
            where=str(run.path),
            fix="check a run of one process; what a resume changes does not depend on their number",
        )
    logged = sorted({line["step"] for line in lines if line["event"] == "train"})
    pairs = [(a, b) for a, b in pairwise(found) if b.step - a.step <= steps]
    if pairs:
        start, goal = pairs[-1]
        return Replay(start.step, goal.step, start, goal)
    at = {checkpoint.step: checkpoint for checkpoint in found}
    for checkpoint in [*reversed(found), None]:
        first = 0 if checkpoint is None else checkpoint.step
        comparable = sorted({*at, *logged} - {step for step in {*at, *logged} if step <= first})
        if comparable:
            end = max([step for step in comparable if step <= first + steps], default=comparable[0])
            return Replay(first, end, checkpoint, at.get(end))
    raise UserError(
        "the run has no log and no checkpoint to compare a replay with",
        where=str(run.path),
        fix="check a run that has made some steps",
    )


def make_again(replay: Replay, config: Config, run: RunDir, again: RunDir, told: Told) -> None:
    """Make the steps of a replay in another run folder."""
    start = None if replay.checkpoint is None else str(replay.checkpoint.path)

    model = config.model
    if model.compute_dtype == "auto":
        model = replace(model, compute_dtype=cast(Any, recorded_dtype(run) or "auto"))

    def go_on(path: str | None, until: int) -> None:
        options = replace(
            config,
            # With a checkpoint, auto is what the run began with.
            model=config.model if replay.checkpoint else model,
            run_dir=str(again.path),
            resume=ResumeConfig(path, allow_changes=True),
            tracking=TrackingConfig(),
        )
        train(Composed(options, {}, config.recipe), progress=told, until=until)

    if replay.middle is not None:
        go_on(start, replay.middle)
        start = "auto"
    go_on(start, replay.end)


def within(lines: list[dict[str, Any]], replay: Replay) -> list[dict[str, Any]]:
    """The lines of the replayed steps that are compared."""
    return [line for line in lines if line["event"] in COMPARED and replay.start < line["step"] <= replay.end]


def same(recorded: Any, replayed: Any) -> bool:
    """Whether what was recorded is in the replay too; of numbers that it lacks, an earlier version knew nothing."""
    if isinstance(recorded, dict) and isinstance(replayed, dict):
        return all(key in replayed and same(value, replayed[key]) for key, value in recorded.items())
    return bool(recorded == replayed)


def compare_lines(recorded: list[dict[str, Any]], replayed: list[dict[str, Any]]) -> list[str]:
    """What the replay logged otherwise, in words.

    It may log more: the run may have ended before its last evaluation.
    """
    found: list[str] = []
    for i, line in enumerate(recorded):
        what = f"step {line['step']}, {line['event']}"
        if i >= len(replayed) or (replayed[i]["step"], replayed[i]["event"]) != (line["step"], line["event"]):
            return [*found, f"{what}: recorded, and not in the replay"]
        for key in sorted(line):
            if not same(line[key], replayed[i].get(key)):
                found.append(f"{what}: {key} is {line.get(key)} in the record and {replayed[i].get(key)} in the replay")
    return found
