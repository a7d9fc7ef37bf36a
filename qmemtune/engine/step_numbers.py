"""The numbers of one optimizer step, over its batches and all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qmemtune.engine.task import Task


class StepNumbers:
    """Losses, counts and gradient norm of the step that is being made.

    Args:
        task: counts, and computes the loss.
        accelerator: joins the processes.
        device: where they add up.
    """

    def __init__(self, task: Task, accelerator: Accelerator, device: torch.device) -> None:
        self.task = task
        self.accelerator = accelerator
        self.device = device
        self.grad_norm: Any = None
        self._batches: list[Any] = []
        # The task's loss, and all that is trained on (with the adapter's own term).
        self._losses = torch.zeros(2, device=device)
        # What Task.count counts, in all processes.
        self._counts = torch.ones(3, dtype=torch.long, device=device)

    def begin(self, batches: list[Any]) -> Tensor | None:
        """Take in the batches of this process; the items of the step in all processes, None if there is no batch."""
        self._batches = batches
        if not batches:
            return None
        counts = torch.stack([self.task.count(batch) for batch in batches]).sum(dim=0)
        self._counts = self.accelerator.reduce(counts.to(self.device), "sum")
        return self._counts[0].clamp(min=1)

    def loss(self, model: nn.Module, batch: Any, items: Any) -> Tensor:
        """The task's loss summed over the batch's items, divided by the items of the whole step.

        The adapter's own term is added. Gradients are averaged over processes, so each multiplies by their number.
        """
        # The adapter's term is a mean over some of the batch's tokens: weigh it by their share.
        share = self.task.count(batch)[2] / self._counts[2].clamp(min=1)
        loss_sum, auxiliary = self.task.loss(model, batch)
        main = loss_sum * (self.accelerator.num_processes / items)
        loss = main + auxiliary * (self.accelerator.num_processes * share)
        self._losses += torch.stack([main.detach(), loss.detach()])
        return loss

    def means(self) -> list[float]:
        """The task's loss, all that was trained on, and the gradient's norm: means over the processes."""
        norm = self.grad_norm.full_tensor() if hasattr(self.grad_norm, "full_tensor") else self.grad_norm
        norm = torch.as_tensor(0.0 if norm is None else norm).to(self._losses).reshape(1)
        # One number that is none makes the mean over all processes none: they decide alike.
        means: list[float] = self.accelerator.reduce(torch.cat([self._losses, norm]), "mean").tolist()
        self._losses = torch.zeros_like(self._losses)
        return means

    @property
    def tokens(self) -> int:
        """Real tokens of the step in all processes."""
        return int(self._counts[1].item())

    def origins(self) -> list[str]:
        """Where the rows of this process come from."""
        return [origin for batch in self._batches for origin in self.task.origins(batch)]

    def end(self) -> None:
        """Let go of the batches."""
        self._batches = []
