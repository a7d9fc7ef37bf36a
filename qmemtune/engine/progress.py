"""What a run tells its audience while it trains. The command line shows it; tests and scripts may stay silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """Receives a run's news, from the main process only and always in order of time."""

    def message(self, text: str) -> None:
        """One line for the reader."""

    def rows(self, what: str, done: int, total: int) -> None:
        """Rows are being prepared: what is done with them, how many are done, how many there are."""

    def start(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Training begins.

        Args:
            total_steps: optimizer steps of the whole run.
            facts: what is about to be trained: ``run_dir``, ``first_step`` (0, or the step resumed from), ``device``,
                ``dtype``, ``trainable_parameters``, ``total_parameters``, ``rows``.
        """

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One optimizer step is done.

        Args:
            step: its number, from 1.
            metrics: ``epoch`` and ``step_s`` (seconds the step took, evaluations left out).
        """

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A logging step: ``step``, ``epoch``, ``loss``, ``learning_rate``, ``grad_norm``, ``tokens_per_s``."""

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Held-out rows were measured: ``step``, and ``loss``, ``perplexity``, ``exact_match``, as far as measured."""

    def finish(self) -> None:
        """Training is over, or was interrupted; called once, also when it failed."""


class SilentProgress:
    """Says nothing."""

    def message(self, text: str) -> None:
        pass

    def rows(self, what: str, done: int, total: int) -> None:
        pass

    def start(self, total_steps: int, facts: Mapping[str, Any]) -> None:
        pass

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def log(self, metrics: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        pass

    def finish(self) -> None:
        pass
