"""What a LoRA adapter adds to each weight, read from its folder, a few rows at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from qmemtune.adapters.files import CONFIG, WEIGHTS
from qmemtune.errors import UserError

PREFIX = "base_model.model."
FROZEN = ".base_layer.weight"
"""End of the names of the base's own weights, which PEFT by itself saves with the update of an output head."""
Rows = Callable[[int, int], Tensor]
"""Rows ``start`` to ``stop`` of a weight, float32, which the caller may change."""


@dataclass(frozen=True)
class Update:
    """The low-rank update of one layer: ``scaling * B A``, and with DoRA a new length of each row of the sum."""

    lora_A: Tensor
    """(r, in_features), float32."""
    lora_B: Tensor
    """(out_features, r), float32."""
    scaling: float
    magnitude: Tensor | None = None
    """DoRA: the learned length of each output feature's row, (out_features,), float32."""

    def merged(self, base: Rows, *, transposed: bool, lengths: Tensor | None = None) -> Rows:
        """Rows of ``base`` with this update.

        Args:
            base: rows of the weight, (in_features, out_features) if ``transposed``, else the other way round.
            lengths: with DoRA and a transposed weight, what :meth:`lengths` returns.
        """
        left, right = (self.lora_A.T, self.lora_B.T) if transposed else (self.lora_B, self.lora_A)

        def rows(start: int, stop: int) -> Tensor:
            whole = base(start, stop).addmm_(left[start:stop], right, alpha=self.scaling)
            if self.magnitude is None:
                return whole
            if transposed:
                assert lengths is not None
                return whole * (self.magnitude / lengths)
            return whole * (self.magnitude[start:stop] / whole.norm(dim=1)).unsqueeze(1)

        return rows

    def lengths(self, base: Rows, count: int, step: int) -> Tensor:
        """Length of each output feature's column of a transposed weight with this update, (out_features,)."""
        squares = torch.zeros(self.lora_B.shape[0])
        for start in range(0, count, step):
            stop = min(start + step, count)
            whole = base(start, stop).addmm_(self.lora_A.T[start:stop], self.lora_B.T, alpha=self.scaling)
            squares += whole.square().sum(dim=0)
        return squares.sqrt()


def read_updates(folder: Path) -> dict[str, Update]:
    """The updates of a PEFT LoRA folder.

    Returns:
        path of each adapted layer in the base model -> its update.

    Raises:
        UserError: the folder is no whole LoRA adapter, or holds more than updates of linear layers.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = [name for name in file.keys() if not name.endswith(FROZEN)]  # noqa: SIM118 - no mapping
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, ValueError) as error:
        raise UserError(
            f"the run's adapter cannot be read: {error}", where=str(folder), fix="is this a whole run folder?"
        ) from error
    updates = {}
    for name in [name for name in names if name.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        factor_a, factor_b = tensors.pop(name).float(), tensors.pop(f"{path}.lora_B.weight").float()
        magnitude = tensors.pop(f"{path}.lora_magnitude_vector", None)
        if magnitude is None:
            magnitude = tensors.pop(f"{path}.lora_magnitude_vector.weight", None)
        path = path.removeprefix(PREFIX)
        updates[path] = Update(
            factor_a,
            factor_b,
            scaling_of(config, path, factor_a.shape[0]),
            None if magnitude is None else magnitude.float().flatten(),
        )
    if tensors or not updates:
        problem = f"{next(iter(tensors))} is not an update of a linear layer" if tensors else "it adapts no layer"
        raise UserError(
            f"this adapter cannot be merged: {problem}", where=str(folder), fix="use export.format=live, which is exact"
        )
    return updates


def scaling_of(config: dict[str, Any], path: str, rank: int) -> float:
    """The factor of a layer's update."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
