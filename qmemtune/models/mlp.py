"""The base of a regression: a small network trained on the first function (``model.path=generated:mlp``)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qmemtune.config.model import MlpConfig
from qmemtune.models.gguf import models_root
from qmemtune.models.threads import torch_threads

logger = logging.getLogger(__name__)

LAYOUT = 1
"""Counts changes to what a trained base is; part of its file's name."""
PRETRAIN_LEARNING_RATE = 2e-3
PRETRAIN_ROWS_PER_STEP = 256


class Mlp(nn.Module):
    """Linear layers with GELU between them, and a linear head. Shapes: input (B, D), output (B, O).

    Args:
        inputs: D.
        outputs: O.
        width: units of each hidden layer.
        depth: hidden layers.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int, depth: int) -> None:
        super().__init__()
        widths = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions, (B, O)."""
        for layer in self.layers:
            x = F.gelu(layer(x))
        result: Tensor = self.head(x)
        return result


def trained_mlp(
    config: MlpConfig, first: Callable[[Tensor], Tensor], *, inputs: int, outputs: int, seed: int, problem: str
) -> Mlp:
    """The base of a problem: trained on its first function when it is first needed, frozen, in eval mode.

    Trained on fresh standard normal inputs without noise, on one thread of the CPU, so that it is the same each time.

    Args:
        config: its size and training.
        first: the function, (N, inputs) to (N, outputs).
        seed: of its first weights and its inputs.
        problem: all that ``first`` depends on, in words; names the stored file with the rest.
    """
    model = Mlp(inputs, outputs, width=config.width, depth=config.depth)
    described = f"{config}|{inputs}|{outputs}|{seed}|{problem}|{torch.__version__}|{LAYOUT}"
    file = models_root() / f"mlp-{hashlib.sha256(described.encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        with torch_threads(1):
            model = fitted(config, first, inputs, outputs, seed)
        store(model, file)
    return model.requires_grad_(False).eval()


def fitted(config: MlpConfig, first: Callable[[Tensor], Tensor], inputs: int, outputs: int, seed: int) -> Mlp:
    """A network after its training; the global random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mlp(inputs, outputs, width=config.width, depth=config.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(config.pretrain_steps, 1))
    for _ in range(config.pretrain_steps):
        x = torch.randn(PRETRAIN_ROWS_PER_STEP, inputs, generator=generator)
        loss = F.mse_loss(model(x), first(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def store(model: Mlp, file: Path) -> None:
    """Keep the weights for later runs; without a cache that can be written they are made anew each time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        save_file(model.state_dict(), beside)
        beside.replace(file)
    except OSError:
        logger.warning("the trained base cannot be kept in %s", file.parent)
