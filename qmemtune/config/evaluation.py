"""Options of evaluation: what is measured on held-out rows, and when."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ExactMatchConfig:
    """Exact match of generated answers."""

    enabled: bool = False
    """Measure it (generation takes time)."""
    every_steps: int | None = None
    """During training, every so many optimizer steps; if not set, at the end only."""
    answer_pattern: str | None = None
    """Regular expression whose last match's first group (or whole match) is the answer, in the output and in the
    reference."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    max_rows: int | None = None
    """Use at most so many held-out rows."""


@dataclass
class SamplesConfig:
    """Sample generations to read."""

    every_steps: int | None = None
    """During training, every so many optimizer steps; if not set, none."""
    count: int = 3
    """Held-out rows to answer."""
    max_new_tokens: int = 64
    """Longest sample, in tokens."""


@dataclass
class EvaluationConfig:
    """What is measured on held-out rows, and when."""

    every_steps: int | None = None
    """Held-out loss during training, every so many optimizer steps; if not set, at the end only."""
    at_start: bool = False
    """Held-out loss before the first step too: that of the base itself."""
    at_end: bool = True
    """Evaluate once more after the last step."""
    per_device_eval_batch_size: int = 16
    """Rows in one evaluation forward pass."""
    max_rows: int | None = None
    """Use at most so many held-out rows for the loss."""
    exact_match: ExactMatchConfig = field(default_factory=ExactMatchConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    tasks: list[str] = field(default_factory=list)
    """lm-evaluation-harness tasks that `qmemtune eval` runs too (needs the extra `eval`)."""
    tasks_limit: int | None = None
    """Use at most so many documents of each harness task."""
