"""What a run trains, as far as the loop needs to know: rows, batches, a loss, a held-out metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler

from qmemtune.config.schema import Config
from qmemtune.engine.batching import BatchForm
from qmemtune.engine.sampler import SeededRandomSampler

Batch = Mapping[str, Any]


class Report(Protocol):
    """What became of the rows."""

    def lines(self) -> list[str]:
        """For people."""

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""


class Task(ABC):
    """The adapted model, the rows it is trained and measured on, and what they mean.

    A loss is a sum over *items* (labelled tokens of a language model, rows of a regression), so that it can be divided
    by those of a whole optimizer step in all processes.
    """

    model: PeftModel
    rows: Sequence[Any]
    """Training rows."""
    heldout: Sequence[Any]
    """Held-out rows."""
    report: Report
    dtype: torch.dtype
    """Of the arithmetic."""
    collator: Callable[[Any], dict[str, Any]]
    """Rows to a batch."""
    form: BatchForm
    """Of the batches."""

    @abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Items in the loss, real tokens, and real tokens that the adapter's own term is a mean over; int64 (3,)."""

    @abstractmethod
    def origins(self, batch: Batch) -> list[str]:
        """Where a batch's rows come from: file and line, or number."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over a batch's items, and the adapter's own term.

        Args:
            model: :attr:`model`, with whatever wraps it in training.
        """

    @abstractmethod
    def evaluate(self, *, exact_match: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Measure the model on the held-out rows, and leave it as it was: ``loss`` and whatever else there is."""

    def samples(self) -> list[dict[str, Any]]:
        """Answers to a few held-out rows; empty where nothing is generated."""
        return []

    def sampler(self, config: Config, world_size: int) -> Sampler[int]:
        """The order of the training rows; has ``set_epoch``."""
        return SeededRandomSampler(len(self.rows), config.seed)

    def notes(self, world_size: int) -> list[str]:
        """Lines for the reader about how the rows are used."""
        return []

    def resolved(self, config: Config) -> Config:
        """The config with what was found out about the rows."""
        return config

    def save_beside(self, folder: Path) -> None:
        """Write into the adapter's folder what a reader needs beside the adapter."""
        return
