"""The one task that is no language model's: which configs ask for a regression, and what it cannot have."""

from __future__ import annotations

from collections.abc import Iterator

from qmemtune.config.missing import MISSING
from qmemtune.config.problem import Problem
from qmemtune.config.schema import Config

GENERATED_MLP = "generated:mlp"
NOISY_REGRESSION = "generated:noisy_regression"
BOTH = "use recipe=regression_noisy, or model=mlp data=regression together"


def is_regression(c: Config) -> bool:
    """Whether the run is a regression on generated rows and not a language model's."""
    return c.model.path == GENERATED_MLP


def regression(c: Config) -> Iterator[Problem]:
    """Half a regression, and options that a regression has no use for."""
    model, data = c.model.path == GENERATED_MLP, c.data.path == NOISY_REGRESSION
    if model and not data and c.data.path != MISSING:
        yield "data.path", f"{GENERATED_MLP} is the base of a regression, and {c.data.path} holds text", BOTH
    if data and not model and c.model.path != MISSING:
        yield "model.path", f"{NOISY_REGRESSION} is a regression, and {c.model.path} a language model", BOTH
    if model and c.quantization.kind != "none":
        yield "quantization.kind", f"{GENERATED_MLP} has no quantised form", "set quantization=none"
    if model and c.evaluation.exact_match.enabled:
        yield "evaluation.exact_match.enabled", "a regression generates no answers", "set it to false"
    if model and c.trainer.gradient_checkpointing:
        yield "trainer.gradient_checkpointing", f"{GENERATED_MLP} has no such mode", "set it to false"
