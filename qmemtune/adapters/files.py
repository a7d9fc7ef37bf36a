"""What an adapter's folder may hold: plain weights and plain options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qmemtune.errors import UserError
from qmemtune.rundir import ADAPTER_FORMAT, check_format

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NAMES_CODE = ("megatron_config", "megatron_core")
"""Options of PEFT's LoRA that name a Python module to import."""


def check_adapter_folder(folder: Path) -> None:
    """Refuse an adapter whose loading could run code, or that is not whole. Nothing but JSON is read.

    Raises:
        UserError: with the reason.
    """
    where = str(folder)
    check_format(folder, "adapter", ADAPTER_FORMAT)
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise UserError(
                f"pickled weights are refused, since loading them can run code: {PICKLED}",
                where=where,
                fix=f"use an adapter with {WEIGHTS}",
            )
        raise UserError(f"not a whole adapter: it has no {WEIGHTS}", where=where, fix="is the copy whole?")
    try:
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{CONFIG} cannot be read: {error}", where=where, fix="is the copy whole?") from None
    if not isinstance(config, dict):
        raise UserError(f"{CONFIG} holds no options", where=where, fix="is the copy whole?")
    if config.get(NAMES_CODE[0]) is not None:
        raise UserError(
            f"its {CONFIG} names a Python module to import ({NAMES_CODE[1]}={config.get(NAMES_CODE[1])!r}): an adapter "
            "is data",
            where=where,
            fix=f"remove {' and '.join(NAMES_CODE)} if you trust the rest",
        )
