"""The end of every export: how far it is from the live model, written down, and refused when that is too far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from qmemtune.adapters import InstructionSource
from qmemtune.config.export import ExportConfig
from qmemtune.data.prepare import prepare_heldout
from qmemtune.engine.restore import LoadedRun
from qmemtune.errors import RunFailed
from qmemtune.evaluation.samples import evenly_spaced
from qmemtune.export.fidelity import FILE, exact_matches, fidelity, too_far
from qmemtune.export.gguf import gguf_fidelity, write_gguf
from qmemtune.export.job import Export
from qmemtune.models.loading import load_base
from qmemtune.rundir import write_json


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
    refuse_too_far(job, f"export.format={job.form}", result["fidelity"])
    write_json(folder / FILE, report(result, config))
    job.seconds["fidelity"] = time.perf_counter() - start


def add_gguf(job: Export, folder: Path, converter: Path) -> None:
    """Write a GGUF file of the merged model, and compare it with the live model where llama.cpp can be asked.

    Raises:
        RunFailed: the converter failed, or the file is too far from the live model.
    """
    config = job.config.export
    assert config.gguf is not None
    job.progress.message(f"converting to GGUF ({config.gguf})")
    file = write_gguf(converter, folder, config.gguf)
    measured = None
    if job.result["fidelity"]:
        heldout = prepare_heldout(job.config.data, job.live.tokenizer).heldout
        measured = gguf_fidelity(file, job.live, evenly_spaced(heldout, config.fidelity_rows))
        if measured is None:
            job.progress.message("the GGUF file is not measured: that needs `pip install llama-cpp-python`")
    job.result["gguf"] = {"file": file.name, "fidelity": measured}
    refuse_too_far(job, f"export.gguf={config.gguf}", measured)
    write_json(folder / FILE, report(job.result, config))


def refuse_too_far(job: Export, what: str, measured: Mapping[str, Any] | None) -> None:
    """Note what is too far from the live model.

    Raises:
        RunFailed: something is, and ``export.force`` is not set.
    """
    config = job.config.export
    reasons = too_far(measured, config) if measured else []
    if not reasons:
        return
    if not config.force:
        exact = "export.format=live is exact" if not config.is_live else "is the base the one that was trained on?"
        if config.format == "merged" and job.config.quantization.kind != "none" and config.base != "auto":
            exact += f"; export.base={config.base} was given, auto takes the base that loses less"
        raise RunFailed(
            f"the export is too far from the live model and was not kept: {'; '.join(reasons)}",
            where=what,
            fix=f"{exact}; --force keeps it all the same, and its card says so",
        )
    job.result["forced"] = True
    job.result.setdefault("too_far", []).extend(reasons)


def report(result: Mapping[str, Any], config: ExportConfig) -> dict[str, Any]:
    """The content of fidelity.json."""
    limits = {"max_kl": config.max_kl, "max_loss_increase": config.max_loss_increase}
    kept = (
        "format",
        "exact",
        "note",
        "forced",
        "too_far",
        "dtype",
        "rounding",
        "base",
        "calibration",
        "distillation",
        "gguf",
    )
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
