"""What a study is: variants of a run, compared in several settings over several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Match:
    """A whole number in a variant's config, chosen by counting trainable parameters."""

    key: str
    """The override that takes the number."""
    bound: Literal["at_least", "at_most"]
    """at_least: the smallest number with at least the other's parameters; at_most: the largest with at most those."""
    against: str
    """The variant whose parameters are matched, in the same setting."""
    largest: int = 512
    """No number above this is tried."""


@dataclass(frozen=True)
class Variant:
    """One way of doing the same task."""

    name: str
    overrides: tuple[str, ...]
    about: str = ""
    """What it is, for tables."""
    match: Match | None = None
    like: str = ""
    """The variant that it is made from, whose special settings it takes too."""


@dataclass(frozen=True)
class Setting:
    """One set of circumstances in which all variants are compared."""

    name: str
    overrides: tuple[str, ...]
    about: str = ""
    for_variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What single variants need in addition here."""


@dataclass(frozen=True)
class Metric:
    """A number of each run that is compared."""

    name: str
    """Its key in a run's held-out metrics."""
    compare: Literal["ratio", "difference"]
    """Losses by their ratio, shares by their difference."""
    higher_is_better: bool = False


LOSS = Metric("loss", "ratio")
ROW_ACCURACY = Metric("row_accuracy", "difference", higher_is_better=True)
EXACT_MATCH = Metric("exact_match", "difference", higher_is_better=True)


@dataclass(frozen=True)
class Study:
    """A plan of runs and how they are compared."""

    name: str
    title: str
    about: str
    """What is compared with what, one or two sentences."""
    recipe: str
    variants: tuple[Variant, ...]
    """All it knows; the first one is the baseline."""
    settings: tuple[Setting, ...]
    overrides: tuple[str, ...] = ()
    """For every run."""
    default_variants: tuple[str, ...] = ()
    """Those that run unless others are named; empty for all."""
    default_settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[Metric, ...] = (LOSS,)
    learning_rates: tuple[float, ...] = ()
    """The stability grid; empty for none."""
    grid_settings: tuple[str, ...] = ()
    """Settings that are run over the grid; empty for all."""
    grid_variants: tuple[str, ...] = ()
    """Variants that are run over the grid; empty for all that are chosen."""
    grid_seeds: tuple[int, ...] = (0, 1, 2)
    on: str | None = None
    """The study whose task it has, where that is not its usual one."""

    @property
    def stem(self) -> str:
        """What its folder and its stored results are called."""
        return self.name if self.on is None else f"{self.name}_{self.on}"
