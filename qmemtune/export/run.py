"""``merge-export``: from a run folder to a folder that others load, with a measurement of how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from qmemtune.adapters import InstructionSource
from qmemtune.config.adapters import MethodConfig
from qmemtune.config.schema import Config
from qmemtune.data.prepare import prepare_data, prepare_heldout
from qmemtune.engine.progress import Progress, SilentProgress
from qmemtune.engine.restore import LoadedRun, load_run
from qmemtune.errors import UserError
from qmemtune.evaluation.samples import evenly_spaced
from qmemtune.export.card import write_card
from qmemtune.export.destination import check_destination, written_whole
from qmemtune.export.fidelity import exact_matches, fidelity
from qmemtune.export.lora import copy_adapter, write_folded_lora
from qmemtune.export.marker import marker, write_marker
from qmemtune.export.merged import write_merged
from qmemtune.export.static import folded_layers
from qmemtune.models.hardware import DTYPES
from qmemtune.models.loading import load_base
from qmemtune.models.sources import resolve
from qmemtune.rundir import RunDir

FOLD_NOTE = (
    "Folding is an approximation: the memory routes each token by itself, the exported weights are one average for all."
    " export.format=adapter keeps the memory exact."
)
INT8_NOTE = "The live model rounds activations to 8 bits; the merged one does not, so they differ a little."
CANDIDATES_PER_ROW = 32
"""Training rows read for each calibration row, so that the calibration rows are spread over the data."""


def export_run(run: RunDir, config: Config, *, progress: Progress | None = None) -> dict[str, Any]:
    """Export the final adapter of a run in the form ``config.export`` asks for.

    Args:
        run: the run folder.
        config: the run's config, with overrides for the export on top.
        progress: is told what happens.

    Returns:
        ``path``, ``format``, ``exact``, ``fidelity`` (see :func:`~qmemtune.export.fidelity.fidelity`), ``note`` where
        the export is not exact, ``dtype`` of merged weights, ``calibration`` of a fold, ``size_bytes``, ``seconds``.

    Raises:
        UserError: the run has no adapter, or the destination cannot be written.
    """
    if isinstance(config.adapter, MethodConfig):
        raise UserError(
            "adapter=peft is for comparisons and has no export of its own",
            where=str(run.adapter),
            fix="that folder is a PEFT adapter already: PeftModel.from_pretrained loads it",
        )
    start = time.perf_counter()
    progress = progress or SilentProgress()
    form = config.export.format
    path = Path(config.export.path).expanduser() if config.export.path else run.export / form
    check_destination(path, overwrite=config.export.overwrite)
    live = load_run(run, config)
    source = resolve(config.model.path, config.model.revision)
    folds = config.adapter.kind == "queryable" and form != "adapter"
    result: dict[str, Any] = {"path": str(path), "format": form, **exactness(config, folds)}
    train, heldout = rows_for(config, live, folds)
    if not heldout:
        progress.message("there are no held-out rows: fidelity is not measured")
    with written_whole(path) as folder:
        folded = None
        if folds:
            progress.message(f"folding the memory over {len(train)} training rows")
            folded = folded_layers(live, train)
            result["calibration"] = {"rows": len(train)}
        progress.message(f"writing {form} to {path}")
        if form == "merged":
            dtype = write_merged(folder, live, folded, DTYPES.get(config.export.dtype))
            result["dtype"] = str(dtype).removeprefix("torch.")
        elif folded is not None:
            write_folded_lora(folder, live.model.get_base_model(), folded, source, dropout=config.adapter.dropout)
        else:
            copy_adapter(run.adapter, folder, source)
        live.tokenizer.save_pretrained(folder)
        progress.message("loading the export back and comparing it with the live model")
        result["fidelity"] = compare(folder, live, heldout)
        write_marker(folder, marker(config, source, result))
        write_card(folder, run, config, source, result)
        result["size_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


def exactness(config: Config, folds: bool) -> dict[str, Any]:
    """``exact``, and a ``note`` that says why not. Exact means: the live model's function, up to rounding."""
    if folds:
        return {"exact": False, "note": FOLD_NOTE}
    if config.export.format == "merged" and config.quantization.kind == "int8":
        return {"exact": False, "note": INT8_NOTE}
    return {"exact": True}


def rows_for(config: Config, live: LoadedRun, folds: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Calibration rows (none unless the memory is folded), spread over the training rows, and all held-out rows.

    Raises:
        UserError: the data cannot be read.
    """
    data, wanted = config.data, config.export.calibration_rows
    if not folds:
        return [], prepare_heldout(data, live.tokenizer).heldout
    if wanted < 1:
        raise UserError("folding needs at least one row", where="export.calibration_rows", fix="leave it at 64")
    most = wanted * CANDIDATES_PER_ROW
    limit = most if data.max_train_rows is None else min(most, data.max_train_rows)
    prepared = prepare_data(replace(data, max_train_rows=limit), live.tokenizer)
    return evenly_spaced(prepared.train, wanted), prepared.heldout


def compare(folder: Path, live: LoadedRun, heldout: Sequence[Any]) -> dict[str, Any]:
    """Load the export back as a user would, in the run's data type, and measure its fidelity.

    Exact match is measured too, on all held-out rows that the run's evaluation uses, if the run has one.
    """
    config = live.config
    rows = evenly_spaced(heldout, config.export.fidelity_rows)
    if not rows:
        return fidelity(live, live.model, rows)
    exported, source = load_back(folder, live)
    found = fidelity(live, exported, rows, source=source)
    if config.evaluation.exact_match.enabled:
        answered = evenly_spaced(heldout, config.evaluation.exact_match.max_rows)
        found |= exact_matches(live, exported, answered, source=source)
    return found


def load_back(folder: Path, live: LoadedRun) -> tuple[nn.Module, InstructionSource | None]:
    """The exported model on the live one's device: merged through plain transformers, an adapter through PEFT."""
    config = live.config
    if config.export.format == "merged":
        kernel = {"attn_implementation": config.model.attn_implementation} if config.model.attn_implementation else {}
        plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=live.dtype, trust_remote_code=config.model.trust_remote_code, **kernel
        )
        return plain.to(live.device), None
    base = load_base(config.model, config.quantization, device=live.device)
    adapted = PeftModel.from_pretrained(base, str(folder))
    return adapted, live.source.of(adapted)
