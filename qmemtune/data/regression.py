"""Noisy regression in which a base is adapted from one function to another: ``data.path=generated:noisy_regression``.

The first function is a random network of one hidden layer. The second one adds a correction that depends on where the
input lies: the input space is divided softly into regions, and each region has a low-rank function of its own.

    f1(x) = f0(x) + Σ_k g_k(x) c_k(x),   g(x) = softmax(sharpness · V x),   c_k(x) = C_k tanh(P_k x)

Tensor letters: N rows, D inputs, O outputs, K regions, H hidden units, L rank of a region's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmemtune.config.data import RegressionDataConfig
from qmemtune.config.schema import Config

HIDDEN_UNITS = 32
SCALED_ON = 8_192
"""Inputs over which functions are scaled."""


class Functions:
    """The two functions of a problem, each output of unit variance for the first, ``correction_std`` for the change.

    Args:
        config: shape of the problem.
        seed: a problem of its own for each.
    """

    def __init__(self, config: RegressionDataConfig, seed: int) -> None:
        self.inputs, self.outputs, self.seed = config.inputs, config.outputs, seed
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        d, o, k, rank = config.inputs, config.outputs, config.regions, config.correction_rank
        self.w_DH = normal(d, HIDDEN_UNITS, std=2 / math.sqrt(d))
        self.w_HO = normal(HIDDEN_UNITS, o)
        self.v_KD = normal(k, d, std=config.sharpness / math.sqrt(d))
        self.p_KLD = normal(k, rank, d, std=2 / math.sqrt(d))
        self.c_KOL = normal(k, o, rank)
        x = normal(SCALED_ON, d)
        self.w_HO = self.w_HO / self.first(x).std(dim=0)
        self.c_KOL = self.c_KOL * (config.correction_std / self.correction(x).std(dim=0))[:, None]

    @property
    def described(self) -> str:
        """All that the first function depends on."""
        return f"{self.inputs} inputs, {self.outputs} outputs, {HIDDEN_UNITS} units, seed {self.seed}"

    def first(self, x: Tensor) -> Tensor:
        """What the base is trained on: (N, D) to (N, O)."""
        return torch.tanh(x @ self.w_DH) @ self.w_HO

    def correction(self, x: Tensor) -> Tensor:
        """What is added to it, (N, O)."""
        regions_NK = torch.softmax(x @ self.v_KD.T, dim=-1)
        low_rank_NKL = torch.tanh(torch.einsum("nd,kld->nkl", x, self.p_KLD))
        return torch.einsum("nk,nkl,kol->no", regions_NK, low_rank_NKL, self.c_KOL)

    def second(self, x: Tensor) -> Tensor:
        """What the adapter is trained on, (N, O)."""
        return self.first(x) + self.correction(x)


class TensorRows(Sequence[dict[str, Tensor]]):
    """Rows ``{"x": (D,), "y": (O,)}`` that lie in two tensors; a loader takes a batch of them at once."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Any:
        return {"x": self.x[index], "y": self.y[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch, as torch's loader asks for it, with ``row``, the rows' numbers."""
        return {"x": self.x[indices], "y": self.y[indices], "row": torch.tensor(indices)}


def collate(batch: Any) -> dict[str, Tensor]:
    """A batch as it came from :meth:`TensorRows.__getitems__`, or made of single rows."""
    if isinstance(batch, dict):
        return batch
    return {name: torch.stack([row[name] for row in batch]) for name in ("x", "y")}


@dataclass
class RegressionData:
    """Rows ready for training and evaluation, and what is known about them."""

    train: TensorRows
    heldout: TensorRows
    """Targets without noise."""
    functions: Functions
    config: RegressionDataConfig

    @property
    def tokens(self) -> int:
        """A training row counts as one."""
        return len(self.train)

    @property
    def warnings(self) -> list[str]:
        """What the user should know about the rows: they are made, and as they should be."""
        return []

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"train: {len(self.train):,} rows of {self.config.inputs} inputs, noise of standard deviation "
            f"{self.config.noise_std:g}",
            f"held out: {len(self.heldout):,} rows without noise",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The report for scripts."""
        return {
            "train": {"rows": len(self.train)},
            "heldout": {"rows": len(self.heldout)},
            "noise_std": self.config.noise_std,
            "seed": self.functions.seed,
        }


def problem_seed(config: Config) -> int:
    """The seed of functions, rows and noise: the run's, if none is given."""
    given = config.data.regression.seed
    return config.seed if given is None else given


def prepare_regression(config: Config) -> RegressionData:
    """Rows of the second function: training rows with noise, held-out rows without."""
    options, seed = config.data.regression, problem_seed(config)
    functions = Functions(options, seed)
    # Apart from the functions' own numbers, which must not depend on how many rows are drawn.
    generator = torch.Generator().manual_seed(seed + 2**32)
    heldout = torch.randn(options.heldout_rows, options.inputs, generator=generator)
    x = torch.randn(options.rows, options.inputs, generator=generator)
    noise = torch.randn(options.rows, options.outputs, generator=generator) * options.noise_std
    return RegressionData(
        train=TensorRows(x, functions.second(x) + noise),
        heldout=TensorRows(heldout, functions.second(heldout)),
        functions=functions,
        config=options,
    )
