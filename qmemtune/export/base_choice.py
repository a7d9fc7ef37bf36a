"""Merging a quantised run: into the dequantised weights that the adapter was trained beside, or the original ones?"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from qmemtune.config.model import QuantizationConfig
from qmemtune.engine.restore import LoadedRun
from qmemtune.export.fidelity import fidelity, too_far
from qmemtune.export.merged import Base
from qmemtune.models.loading import load_base

MEASURED = ("loss_exported", "kl_mean")


def compare_bases(live: LoadedRun, lora: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Base, dict[str, Any]]:
    """Measure a LoRA on both bases and take the better.

    The better one has the lower loss, but the original base only if it keeps within the limits of the config: it is
    another function than the one that was trained.

    Args:
        lora: the LoRA that is to be merged.
        rows: calibration rows.

    Returns:
        The choice, and ``loss_exported`` and ``kl_mean`` of each, with the ``rows``.
    """
    config = live.config
    found = {}
    for name, quantization in (("dequantized", config.quantization), ("original", QuantizationConfig())):
        base = load_base(config.model, quantization, device=live.device)
        found[name] = fidelity(live, PeftModel.from_pretrained(base, str(lora)), rows)
        del base
        gc.collect()
    better = found["original"]["loss_exported"] < found["dequantized"]["loss_exported"]
    choice: Base = "original" if better and not too_far(found["original"], config.export) else "dequantized"
    measured = {name: {key: values[key] for key in MEASURED} for name, values in found.items()}
    return choice, {"base": choice, "rows": len(rows), **measured}
