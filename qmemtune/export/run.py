"""``merge-export``: from a run folder to a folder that others load, with a measurement of how far it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from qmemtune.adapters import InstructionSource
from qmemtune.config.schema import Config
from qmemtune.data.prepare import PreparedData, prepare_data, prepare_heldout
from qmemtune.engine.progress import Progress, SilentProgress
from qmemtune.engine.restore import LoadedRun, load_run
from qmemtune.errors import RunFailed
from qmemtune.evaluation.samples import evenly_spaced
from qmemtune.export.base_choice import compare_bases
from qmemtune.export.card import write_card
from qmemtune.export.destination import check_destination, written_whole
from qmemtune.export.distill import distilled
from qmemtune.export.exactness import exactness, require_exportable
from qmemtune.export.fidelity import FILE as FIDELITY
from qmemtune.export.fidelity import exact_matches, fidelity, too_far
from qmemtune.export.lora import copy_adapter, write_folded_lora
from qmemtune.export.marker import marker, write_marker
from qmemtune.export.merged import Base, Merge
from qmemtune.export.static import folded_layers
from qmemtune.models.hardware import DTYPES, compute_dtype, pick_device
from qmemtune.models.loading import load_base, load_tokenizer
from qmemtune.models.sources import Source, resolve
from qmemtune.rundir import RunDir, write_json

CANDIDATES_PER_ROW = 32
"""Training rows read for each calibration row, so that the calibration rows are spread over the data."""


@dataclass
class Export:
    """One export under way."""

    run: RunDir
    config: Config
    progress: Progress
    source: Source
    """The base model's."""
    result: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    _live: LoadedRun | None = None

    @property
    def form(self) -> str:
        return self.config.export.format

    @property
    def folds(self) -> bool:
        """Whether routing has to be replaced by static updates."""
        return self.config.adapter.kind == "queryable" and self.form != "live"

    @property
    def live(self) -> LoadedRun:
        """The live model; loaded when first asked for, since large models are merged without it."""
        if self._live is None:
            self._live = load_run(self.run, self.config)
        return self._live

    def tokenizer(self) -> Any:
        """The run's tokenizer."""
        return self._live.tokenizer if self._live is not None else load_tokenizer(self.config.model)


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
    path = Path(config.export.path).expanduser() if config.export.path else run.export / config.export.format
    check_destination(path, force=config.export.force)
    found = exactness(config, config.export.format)
    result: dict[str, Any] = {"path": str(path), "format": config.export.format, "exact": found.exact}
    if not found.exact:
        result["note"] = f"{found.why[0].upper()}{found.why[1:]}."
    source = resolve(config.model.path, config.model.revision)
    job = Export(run, config, progress or SilentProgress(), source, result)
    with written_whole(path) as folder:
        write(job, folder)
        measure(job, folder)
        write_marker(folder, marker(config, source, result))
        write_card(folder, run, config, source, result)
        result["size_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
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
            folded, result["distillation"] = distilled(job.run, job.live, folded, rows, job.progress)
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
    job.seconds |= merged.pop("seconds")
    result |= merged


def calibration_rows(job: Export) -> Sequence[Any]:
    """Calibration rows to fold on, and to compare bases on; none if nothing needs any.

    Raises:
        UserError: the data cannot be read.
    """
    export = job.config.export
    compares = job.form == "merged" and job.config.quantization.kind != "none" and export.base == "auto"
    if not (job.folds or (compares and export.fidelity)):
        return []
    return calibration_data(job, export.calibration_rows).train


def calibration_data(job: Export, wanted: int) -> PreparedData:
    """Rows spread over the run's training rows, or over those of ``export.calibration``; all in ``train``.

    Raises:
        UserError: the data cannot be read.
    """
    data = job.config.data
    if job.config.export.calibration is not None:
        data = replace(
            data,
            path=job.config.export.calibration,
            eval_path=None,
            eval_split=None,
            eval_fraction=0.0,
            max_train_rows=None,
        )
    most = wanted * CANDIDATES_PER_ROW
    limit = most if data.max_train_rows is None else min(most, data.max_train_rows)
    prepared = prepare_data(replace(data, max_train_rows=limit), job.live.tokenizer)
    count = len(prepared.train)
    return replace(prepared, train=prepared.train.select(evenly_spaced(range(count), wanted)))


def measure(job: Export, folder: Path) -> None:
    """Compare the written export with the live model, write fidelity.json, and refuse what is too far.

    Raises:
        RunFailed: it is too far, and ``export.force`` is not set.
    """
    config, result = job.config.export, job.result
    result["fidelity"], result["forced"] = None, False
    start = time.perf_counter()
    if config.fidelity:
        heldout = prepare_heldout(job.config.data, job.live.tokenizer).heldout
        if heldout:
            job.progress.message("loading the export back and comparing it with the live model")
            result["fidelity"] = compare(folder, job.live, heldout)
        else:
            job.progress.message("there are no held-out rows: fidelity is not measured")
    found = result["fidelity"]
    reasons = too_far(found, config) if found else []
    if reasons and not config.force:
        exact = "export.format=live is exact" if job.form != "live" else "the live model itself differs: is the base?"
        raise RunFailed(
            f"the export is too far from the live model and was not kept: {'; '.join(reasons)}",
            where=f"export.format={job.form}",
            fix=f"{exact}; --force keeps it all the same, and its card says so",
        )
    result["forced"] = bool(reasons)
    if reasons:
        result["too_far"] = reasons
    write_json(folder / FIDELITY, report(result, config))
    job.seconds["fidelity"] = time.perf_counter() - start


def report(result: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The content of fidelity.json."""
    limits = {"max_kl": config.max_kl, "max_loss_increase": config.max_loss_increase}
    kept = ("format", "exact", "note", "forced", "too_far", "dtype", "rounding", "base", "calibration", "distillation")
    measured = result["fidelity"]
    reason = None if measured else "switched off" if not config.fidelity else "no held-out rows"
    return {
        "measured": measured is not None,
        **({"reason": reason} if reason else {}),
        **(measured or {}),
        "limits": limits,
        **{key: result[key] for key in kept if key in result},
    }


def compare(folder: Path, live: LoadedRun, heldout: Sequence[Any]) -> dict[str, Any]:
    """Load the export back as a user would, in the run's data type, and measure its fidelity.

    Exact match is measured too, on all held-out rows that the run's evaluation uses, if the run has one.
    """
    config = live.config
    exported, source = load_back(folder, live)
    found = fidelity(live, exported, evenly_spaced(heldout, config.export.fidelity_rows), source=source)
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
