"""``merge-export``: from a run folder to a folder that others load, with a measurement of how far it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmemtune.config.schema import Config
from qmemtune.data.chat import turn_end
from qmemtune.engine.progress import Progress, SilentProgress
from qmemtune.export.base_choice import compare_bases
from qmemtune.export.basefiles import end_generation_at
from qmemtune.export.card import write_card
from qmemtune.export.destination import check_destination, destination, written_whole
from qmemtune.export.distill import distilled
from qmemtune.export.exactness import exactness, require_exportable
from qmemtune.export.gguf import find_converter
from qmemtune.export.hub import push
from qmemtune.export.job import Export, calibration_data, calibration_rows
from qmemtune.export.lora import copy_adapter, write_folded_lora
from qmemtune.export.marker import marker, write_marker
from qmemtune.export.measure import add_gguf, measure
from qmemtune.export.merged import Base, Merge
from qmemtune.export.pin import pinned, weights_digest
from qmemtune.export.static import folded_layers
from qmemtune.models.hardware import DTYPES, compute_dtype, pick_device
from qmemtune.models.sources import resolve
from qmemtune.rundir import RunDir


def export_run(run: RunDir, config: Config, *, progress: Progress | None = None) -> dict[str, Any]:
    """Export the final adapter of a run in the form ``config.export`` asks for.

    Args:
        run: the run folder.
        config: the run's config, with overrides for the export on top.
        progress: is told what happens.

    Returns:
        ``path``, ``format``, ``exact``, ``note`` where it is not, ``fidelity`` (see
        :func:`~qmemtune.export.fidelity.fidelity`; None where it was not measured) and ``forced``; of merged weights
        ``dtype``, ``rounding`` and the ``base`` they were merged into; ``calibration`` of a fold; ``size_bytes``,
        ``seconds`` of each part.

    Raises:
        UserError: the run has no adapter, or the destination cannot be written.
        RunFailed: the export is too far from the live model.
    """
    start = time.perf_counter()
    require_exportable(run, config)
    path = destination(run, config.export)
    check_destination(path, force=config.export.force)
    found = exactness(config, config.export.format)
    result: dict[str, Any] = {"path": str(path), "format": config.export.format, "exact": found.exact}
    if not found.exact:
        result["note"] = f"{found.why[0].upper()}{found.why[1:]}."
    converter = find_converter() if config.export.format == "merged" and config.export.gguf else None
    source = pinned(resolve(config.model.path, config.model.revision), config.model)
    if config.export.format != "merged":
        result["base_sha256"] = weights_digest(source)
    job = Export(run, config, progress or SilentProgress(), source, result)
    with written_whole(path) as folder:
        write(job, folder)
        measure(job, folder)
        if converter is not None:
            add_gguf(job, folder, converter)
        write_marker(folder, marker(config, source, result))
        write_card(folder, run, config, source, result)
        result["size_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if config.export.push_to_hub is not None:
        job.progress.message(f"uploading to {config.export.push_to_hub}")
        result["pushed_to"] = push(path, config.export)
    job.seconds["total"] = time.perf_counter() - start
    result["seconds"] = {name: round(value, 2) for name, value in job.seconds.items()}
    return result


def write(job: Export, folder: Path) -> None:
    """Write the model, but neither card nor marker."""
    config, result = job.config, job.result
    calibration = calibration_rows(job)
    lora = job.run.adapter
    if job.folds:
        job.progress.message(f"folding the memory over {len(calibration)} calibration rows")
        start = time.perf_counter()
        # Beside what is to be served: a merged model is made from it, and does not keep it.
        lora = folder if job.form == "lora" else folder / ".lora"
        folded = folded_layers(job.live, calibration, config.export.fold)
        result["calibration"] = {"rows": len(calibration), "fold": config.export.fold}
        job.seconds["fold"] = time.perf_counter() - start
        if config.export.fold == "distill":
            start = time.perf_counter()
            rows = calibration_data(job, config.export.distill_rows)
            # Neither fold is always the nearer one: errors of one layer change the inputs of the next.
            starts = {"least_squares": folded, "mean": folded_layers(job.live, calibration, "mean")}
            folded, result["distillation"] = distilled(job.run, job.live, starts, calibration, rows, job.progress)
            job.seconds["distill"] = time.perf_counter() - start
        base = job.live.model.get_base_model()
        write_folded_lora(lora, base, folded, job.source, dropout=config.adapter.dropout)
    job.progress.message(f"writing {job.form} to {result['path']}")
    if job.form == "merged":
        write_merged(job, folder, lora, calibration)
        if job.folds:
            shutil.rmtree(lora)
        return
    if lora is not folder:
        copy_adapter(lora, folder, job.source)
    job.tokenizer().save_pretrained(folder)


def write_merged(job: Export, folder: Path, lora: Path, calibration: Sequence[Any]) -> None:
    """Merge a LoRA into the base, and say which base was taken."""
    config, result = job.config, job.result
    quantised = config.quantization.kind != "none"
    choice: Base = "original" if config.export.base == "original" else "dequantized"
    if quantised:
        result["base"] = {"base": choice}
        if config.export.base == "auto" and calibration and config.export.fidelity:
            job.progress.message(f"comparing the two bases to merge into on {len(calibration)} training rows")
            choice, result["base"] = compare_bases(job.live, lora, calibration)
            if choice == "original":
                result["exact"] = False
                result["note"] = f"Merged into the original base, which has the lower loss on {len(calibration)} rows."
    device = pick_device()
    # With settings of its own the run's tokenizer is not the base's.
    keep_tokenizer = config.model.tokenizer is None and config.model.chat_template is None
    merge = Merge(
        source=job.source,
        model=config.model,
        quantization=config.quantization,
        lora=lora,
        compute_dtype=compute_dtype(config.model.compute_dtype, device),
        device=device,
        base=choice,
        dtype=DTYPES.get(config.export.dtype),
    )
    merged = merge.run(folder, keep_tokenizer=keep_tokenizer)
    if not keep_tokenizer:
        job.tokenizer().save_pretrained(folder)
    tokenizer = job.tokenizer()
    end_generation_at(folder, [token for token in (tokenizer.eos_token_id, turn_end(tokenizer)) if token is not None])
    job.seconds |= merged.pop("seconds")
    result |= merged
