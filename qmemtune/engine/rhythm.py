"""When a run logs, evaluates, saves and stops: the config's intervals, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qmemtune.config.schema import Config


@dataclass(frozen=True)
class Due:
    """What is to be measured at a step."""

    loss: bool
    exact_match: bool
    samples: bool

    def __bool__(self) -> bool:
        return self.loss or self.exact_match or self.samples


def falls_on(step: int, interval: int | None) -> bool:
    """Whether something that happens every ``interval`` steps (None: never) happens at ``step``."""
    return bool(interval) and step % interval == 0  # type: ignore[operator]


def due_at(step: int, config: Config) -> Due:
    """What the config wants measured at ``step``; the evaluation at the end comes on top."""
    evaluation = config.evaluation
    exact_match = evaluation.exact_match
    return Due(
        loss=falls_on(step, evaluation.every_steps),
        exact_match=exact_match.enabled and falls_on(step, exact_match.every_steps),
        samples=falls_on(step, evaluation.samples.every_steps),
    )


class Stepped(Protocol):
    """The trainer, as far as the rhythm needs it."""

    ended: bool
    """Whether no step is to be made any more."""

    paused: bool
    """Whether the run was to go no further than this step for now."""

    def catch_up(self) -> None:
        """Called before the first step of this process."""

    def begin_epoch(self, epoch: int) -> None:
        """Order the rows of an epoch."""

    def check_step(self) -> None:
        """Called before the optimizer's step."""

    def end_step(self) -> None:
        """Called after it."""

    def stop_requested(self) -> bool:
        """Whether a signal asked to stop, in any process, or too many steps in a row were bad."""

    def finish(self) -> None:
        """Called after the last step, while logging back-ends are still open."""


class Rhythm(TrainerCallback):
    """Tells Trainer what comes after each step: log, evaluate, save, stop, in this order.

    Args:
        config: holds the intervals.
        run: does the work.
        has_heldout: whether there is anything to evaluate on.
    """

    def __init__(self, config: Config, run: Stepped, *, has_heldout: bool) -> None:
        self.config = config
        self.run = run
        self.has_heldout = has_heldout

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.run.catch_up()
        if self.run.ended:
            control.should_training_stop = True
        return control

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Accelerate does not pass the epoch on to a sampler behind both a shard and a skip, as after a resume.
        self.run.begin_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.check_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.run.end_step()
        step, trainer = state.global_step, self.config.trainer
        last = step >= state.max_steps
        control.should_log = last or falls_on(step, trainer.logging_steps)
        control.should_evaluate = self.has_heldout and bool(due_at(step, self.config))
        control.should_save = last or falls_on(step, trainer.save_steps)
        if self.run.stop_requested():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        elif self.run.paused:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.finish()
