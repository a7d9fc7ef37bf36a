"""A profile of a few training steps: a trace to look at, and the costliest operations as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FIRST, LAST = 5, 7
"""Steps of this process that are profiled, counted from 1: those before them warm caches up."""
SHOWN = 10


class StepProfile(TrainerCallback):
    """Profiles steps 5 to 7 of this process.

    Args:
        trace: Chrome trace that is written, JSON; open it in Perfetto or chrome://tracing.
        say: takes the lines about the costliest operations.
    """

    def __init__(self, trace: Path, say: Callable[[str], None]) -> None:
        self.trace, self.say = trace, say
        self._steps = 0
        self._profile: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin before the first profiled step."""
        self._steps += 1
        if self._steps == FIRST:
            activities = [ProfilerActivity.CPU]
            if args.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End behind the last one."""
        if self._profile is None or self._steps < LAST:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        found, self._profile = self._profile, None
        found.stop()
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.trace))
        for line in costliest(found.key_averages(), steps=LAST - FIRST + 1, on_gpu=args.device.type == "cuda"):
            self.say(line)
        self.say(f"trace of steps {FIRST} to {LAST}: {self.trace} (open it in https://ui.perfetto.dev)")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so when training was too short."""
        if self._steps < LAST:
            if self._profile is not None:
                self._profile.stop()
            self.say(f"no profile: {self._steps} steps were trained, and it takes {LAST} (trainer.profile)")


def costliest(averages: Any, *, steps: int, on_gpu: bool) -> list[str]:
    """Lines on the operations that took the most time by themselves, the costliest first.

    Args:
        averages: a torch profile's ``key_averages()``.
        steps: training steps in it.
        on_gpu: rank by time on the GPU.
    """

    def microseconds(entry: Any) -> float:
        return float(entry.self_device_time_total if on_gpu else entry.self_cpu_time_total)

    total = sum(microseconds(entry) for entry in averages)
    where = "GPU" if on_gpu else "CPU"
    lines = [f"costliest operations of steps {FIRST} to {LAST} ({where} time of each by itself):"]
    for entry in sorted(averages, key=microseconds, reverse=True)[:SHOWN]:
        lines.append(
            f"  {microseconds(entry) / total:6.1%}  {microseconds(entry) / steps / 1e3:9.2f} ms a step  "
            f"{entry.count / steps:7.0f} calls  {entry.key}"
        )
    return lines
