"""Sums over a whole run, which survive interruption: loss, tokens and time."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

FILE = "totals.json"
RECENT = 50
"""Losses that are remembered."""
WARM_UP, ENOUGH = 2, 4
"""So many first steps, which fill caches and compile kernels, are no measure of speed where there are more than so many
in all."""


@dataclass
class Window:
    """Steps since the last logged one."""

    steps: int = 0
    loss: float = 0.0
    """Sum of the steps' losses."""
    tokens: int = 0
    """Real tokens, padding left out."""
    seconds: float = 0.0
    """Time in training steps; evaluations and checkpoints are not in it."""

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        self.steps += 1
        self.loss += loss
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class Totals:
    """What a run has done so far. Saved with each checkpoint, so that a resumed run logs what the whole one would."""

    run: Window = field(default_factory=Window)
    window: Window = field(default_factory=Window)
    warm_up: Window = field(default_factory=Window)
    """The first steps."""
    step_seconds: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    """Steps that were left out because loss or gradient was no number."""
    loss_spikes: int = 0
    """Steps whose loss jumped."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the latest steps."""
    router_collapsed_at_step: int | None = None
    """First step at which a memory's router was seen collapsed."""

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        """Add one optimizer step: its mean loss, real tokens over all processes, and seconds."""
        self.run.add(loss, tokens, seconds)
        self.window.add(loss, tokens, seconds)
        if self.warm_up.steps < WARM_UP:
            self.warm_up.add(loss, tokens, seconds)
        self.step_seconds.append(round(seconds, 6))

    def add_skipped(self, seconds: float) -> None:
        """Add the time of a step that was left out."""
        self.run.seconds += seconds
        self.window.seconds += seconds

    def remember(self, loss: float) -> None:
        """Add to the latest losses."""
        self.recent_losses = [*self.recent_losses[1 - RECENT :], loss]

    def take_window(self) -> Window:
        """The steps since the last call."""
        window, self.window = self.window, Window()
        return window

    @property
    def train_loss(self) -> float | None:
        """Mean loss over the run's steps."""
        return self.run.loss / self.run.steps if self.run.steps else None

    @property
    def tokens_per_s(self) -> float | None:
        """Real tokens a second of training time, behind the first steps where there are enough others."""
        first = self.warm_up if self.run.steps > ENOUGH else Window()
        seconds = self.run.seconds - first.seconds
        return (self.run.tokens - first.tokens) / seconds if seconds > 0 else None

    @property
    def step_s_median(self) -> float | None:
        """Median seconds of a step, of the first ones only where there are few others."""
        seconds = self.step_seconds[WARM_UP:] if len(self.step_seconds) > ENOUGH else self.step_seconds
        return median(seconds) if seconds else None

    def save(self, folder: Path) -> None:
        """Write into a checkpoint folder."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Totals:
        """Read from a checkpoint folder."""
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
        for name in ("run", "window", "warm_up"):
            stored[name] = Window(**stored.get(name, {}))
        return cls(**stored)


class Stopwatch:
    """Seconds since it was started, as often as asked."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def start(self) -> None:
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began
