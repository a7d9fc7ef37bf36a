"""Keeps the adapter with the lowest held-out loss, and says when to stop because it no longer falls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "best_weights.safetensors"
STATE = "best.json"


@dataclass
class Best:
    """The best evaluation so far.

    Args:
        keep_weights: keep a copy of the trainable weights (in main memory) to end with.
    """

    keep_weights: bool
    step: int | None = None
    loss: float | None = None
    evaluations_since: int = 0
    """Evaluations without a lower loss."""
    last_step: int | None = None
    """Step of the last evaluation counted: one step counts once."""
    weights: dict[str, Tensor] | None = None

    def update(self, step: int, loss: float | None, model: nn.Module) -> None:
        """Take in the held-out loss at ``step``; None is a loss that is not a number."""
        if step == self.last_step:
            return
        self.last_step = step
        if loss is None or (self.loss is not None and not loss < self.loss):
            self.evaluations_since += 1
            return
        self.step, self.loss, self.evaluations_since = step, loss, 0
        if self.keep_weights:
            self.weights = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> bool:
        """Put the best weights back into the model; False when none are kept."""
        if self.weights is None:
            return False
        parameters = dict(model.named_parameters())
        for name, kept in self.weights.items():
            parameters[name].copy_(kept)
        return True

    def save(self, folder: Path) -> None:
        """Write into a checkpoint folder."""
        state = {
            "step": self.step,
            "loss": self.loss,
            "evaluations_since": self.evaluations_since,
            "last_step": self.last_step,
        }
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        if self.weights is not None:
            save_file({name: kept.contiguous() for name, kept in self.weights.items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, *, keep_weights: bool) -> Best:
        """Read from a checkpoint folder."""
        best = cls(keep_weights, **json.loads((folder / STATE).read_text(encoding="utf-8")))
        if keep_weights and (folder / WEIGHTS).is_file():
            best.weights = load_file(folder / WEIGHTS)
        return best
