"""Adapting a small network from one function to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from qmemtune.config.model import MlpConfig
from qmemtune.config.regression import NOISY_REGRESSION
from qmemtune.config.schema import Config
from qmemtune.data.regression import RegressionData, collate
from qmemtune.engine.batching import BatchForm
from qmemtune.engine.task import Batch, Task
from qmemtune.evaluation.forward import evaluation_forward
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.summary import finite
from qmemtune.models.hardware import autocast
from qmemtune.models.mlp import Mlp, trained_mlp


def regression_base(config: MlpConfig, data: RegressionData) -> Mlp:
    """The network that has learned the problem's first function."""
    functions = data.functions
    return trained_mlp(
        config,
        functions.first,
        inputs=functions.inputs,
        outputs=functions.outputs,
        seed=functions.seed,
        problem=functions.described,
    )


class RegressionTask(Task):
    """Mean squared error on noisy rows, measured on held-out rows without noise; a row counts as one token.

    Args:
        model: the adapted network.
        data: rows of the second function.
        config: the run.
        device: where the model is.
        dtype: of the arithmetic.
    """

    def __init__(
        self, model: PeftModel, data: RegressionData, config: Config, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.rows, self.heldout, self.report = model, data.train, data.heldout, data
        self.data, self.device, self.dtype = data, device, dtype
        self.max_rows = config.evaluation.max_rows
        self.collator = collate
        self.form = BatchForm.of(config, device)
        self.one_each = torch.tensor([1, 1, 0])

    def count(self, batch: Batch) -> Tensor:
        """Rows, rows, and none under an instruction."""
        return self.one_each * len(batch["x"])

    def origins(self, batch: Batch) -> list[str]:
        """Numbers of the generated rows."""
        return [f"{NOISY_REGRESSION}:{row}" for row in batch["row"].tolist()]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Squared errors summed over rows, averaged over a target's outputs."""
        predicted = model(batch["x"])
        return squared_errors(predicted, batch["y"]).sum(), predicted.new_zeros(())

    def evaluate(self, *, exact_match: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """``loss``, the mean squared error (None where it is no number), and ``rows``."""
        rows = self.data.heldout[slice(self.max_rows)]
        x, y = rows["x"].to(self.device), rows["y"].to(self.device)
        with undisturbed(self.model), evaluation_forward([], None, lambda: autocast(self.device, self.dtype)):
            errors = squared_errors(self.model(x), y)
        progress("loss", len(x), len(x))
        return {"loss": finite(errors.double().mean().item()), "rows": len(x)}


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """The squared error of each row, averaged over outputs, fp32 (B,)."""
    return F.mse_loss(predicted.float(), target, reduction="none").mean(dim=-1)
