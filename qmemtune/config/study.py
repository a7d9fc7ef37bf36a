"""Options of ``qmemtune study``, beside those of the runs it is made of. The only source of their defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class StudyConfig:
    """What of a study's plan is run, and how."""

    seeds: list[int] | None = None
    """Seeds of the runs; the study's own if not set."""
    settings: list[str] | None = None
    """Settings to run, by name; the study's own if not set."""
    variants: list[str] | None = None
    """Variants to compare, by name; the study's own if not set. The first one is what the others are compared with."""
    learning_rates: list[float] | None = None
    """Learning rates of the stability grid ([] for none); the study's own if not set."""
    grid_seeds: list[int] | None = None
    """Seeds of the stability grid; the study's own if not set."""
    tuning_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds on which settings were chosen; what the others show is reported apart."""
    jobs: int = 1
    """Processes that run cells side by side, each with one torch thread if there are several."""
    on: Literal["regression", "instructions", "codes", "quickstart"] = "regression"
    """ablations only: the study whose task and settings are used."""
