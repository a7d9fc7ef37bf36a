"""What a run shows while it works: live on a terminal, plain lines otherwise. All of it goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from qmemtune.cli.numbers import duration, metrics_line, short
from qmemtune.engine.progress import SilentProgress

if TYPE_CHECKING:
    from qmemtune.engine.progress import Progress


def make_progress(*, quiet: bool) -> Progress:
    """The display that fits: silent, live, or plain lines."""
    if quiet:
        return SilentProgress()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def facts_line(total_steps: int, facts: Mapping[str, Any]) -> str:
    """One line about what is going to be trained."""
    parts = [f"{total_steps} steps"]
    if facts.get("first_step"):
        parts[0] += f" (going on after step {facts['first_step']})"
    if facts.get("rows") is not None:
        parts.append(f"{facts['rows']:,} rows")
    if facts.get("trainable_parameters") is not None:
        parts.append(f"{facts['trainable_parameters']:,} trainable parameters")
    parts.append(f"{facts.get('device', '?')}, {facts.get('dtype', '?')}")
    if facts.get("run_dir"):
        parts.append(str(facts["run_dir"]))
    return "training: " + ", ".join(parts)


def log_line(metrics: Mapping[str, Any]) -> str:
    """``loss 1.2340, lr 1.0e-03, 480 tokens/s``."""
    parts = [f"loss {metrics['loss']:.4f}"] if metrics.get("loss") is not None else []
    if metrics.get("learning_rate") is not None:
        parts.append(f"lr {metrics['learning_rate']:.2e}")
    if metrics.get("tokens_per_s") is not None:
        parts.append(f"{short(round(metrics['tokens_per_s']))} tokens/s")
    return ", ".join(parts)


class PlainProgress:
    """One line for each logging step, evaluation and message."""

    def __init__(self) -> None:
        self.total = 0
        self.first = 0
        self.counter = PatientCounter()
        self.begun = time.monotonic()

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def rows(self, what: str, done: int, total: int) -> None:
        self.counter(what, done, total)

    def start(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        self.total, self.first, self.begun = total_steps, int(facts.get("first_step") or 0), time.monotonic()
        self.message(facts_line(total_steps, facts))

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def log(self, metrics: Mapping[str, Any]) -> None:
        step = int(metrics.get("step") or 0)
        done = step - self.first
        left = (time.monotonic() - self.begun) / done * (self.total - step) if done > 0 else None
        ending = f", {duration(left)} left" if left is not None and step < self.total else ""
        self.message(f"step {step}/{self.total}: {log_line(metrics)}{ending}")

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        self.message(f"step {metrics.get('step', '?')}/{self.total}: held-out {metrics_line(metrics)}")

    def finish(self) -> None:
        pass


class LiveProgress:
    """A progress bar with the latest numbers under it; messages and evaluations scroll by above."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.bar: _BarAndNumbers | None = None
        self.task = TaskID(0)
        self.counter = PatientCounter()

    def message(self, text: str) -> None:
        self.console.print(Text(text))

    def rows(self, what: str, done: int, total: int) -> None:
        self.counter(what, done, total)

    def start(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        self.message(facts_line(total_steps, facts))
        self.bar = _BarAndNumbers(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=int(facts.get("first_step") or 0))
        self.bar.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        if self.bar is not None:
            self.bar.numbers = log_line(metrics)

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        line = f"step {metrics.get('step', '?')}: held-out {metrics_line(metrics)}"
        self.message(line)
        if self.bar is not None:
            self.bar.last_evaluation = line

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class _BarAndNumbers(RichProgress):
    numbers = ""
    last_evaluation = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        text = "   ".join(part for part in (self.numbers, self.last_evaluation) if part)
        if text:
            yield Text(text, style="cyan", overflow="ellipsis", no_wrap=True)


class RowCounter:
    """Counts rows of an evaluation: a passing bar on a terminal, otherwise a line for each measure that is done."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.bar = (
            None
            if quiet or not sys.stderr.isatty()
            else RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows, left"),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
                transient=True,
            )
        )
        self.tasks: dict[str, TaskID] = {}
        self.begun = time.monotonic()

    def __enter__(self) -> RowCounter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of the measure ``what``."""
        if self.bar is not None:
            if what not in self.tasks:
                self.tasks[what] = self.bar.add_task(what, total=total)
            self.bar.update(self.tasks[what], completed=done, total=total)
        elif not self.quiet and done >= total:
            print(f"{what}: {total} rows in {duration(time.monotonic() - self.begun)}", file=sys.stderr, flush=True)
            self.begun = time.monotonic()


class PatientCounter:
    """A :class:`RowCounter` for work that is usually short: it shows nothing until some seconds have passed."""

    patience_s = 2.0

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.what = ""
        self.begun = time.monotonic()
        self.counter: RowCounter | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` rows of ``what``."""
        if what != self.what:
            self.what, self.begun = what, time.monotonic()
        if self.counter is None and done < total and time.monotonic() - self.begun >= self.patience_s:
            self.counter = RowCounter(quiet=self.quiet)
            self.counter.begun = self.begun
            self.counter.__enter__()
        if self.counter is not None:
            self.counter(what, done, total)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.counter is not None:
            self.counter.__exit__()
            self.counter = None
