"""Measures an exported folder, beside its base where that can be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from qmemtune.config.schema import Config
from qmemtune.data.prepare import prepare_heldout
from qmemtune.errors import UserError
from qmemtune.evaluation.evaluate import EvalProgress
from qmemtune.evaluation.forward import one_for_all
from qmemtune.evaluation.harness import check_tasks
from qmemtune.evaluation.verb import Measured, by_itself, evaluate_pair, measure, prefixed, side_by_side
from qmemtune.export.opening import Exported, load_exported
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.models.loading import load_base, load_tokenizer


def evaluate_exported(
    exported: Exported,
    *,
    say: Callable[[str], None],
    progress: EvalProgress | None = None,
    instruction: str | None = None,
) -> dict[str, Any]:
    """Measure an exported folder and its base on the same held-out rows.

    Rows are rendered by the folder's own tokenizer, which is the run's.

    Args:
        say: told, in one line, why a base is not measured.
        instruction: text for the instruction prior in place of each row's own.

    Returns:
        ``model``, ``format``, ``base_model``, and what :func:`~qmemtune.evaluation.verb.side_by_side` reports; ``base``
        is None where the base of a merged model cannot be found.

    Raises:
        UserError: the model, its base as given by the user, or the rows cannot be loaded.
    """
    config, folder = exported.config, exported.path
    check_tasks(config.evaluation.tasks)
    config = replace(config, model=replace(config.model, tokenizer=config.model.tokenizer or str(folder)))
    if exported.format == "merged":
        if instruction is not None:
            raise UserError(
                "an instruction has no effect on a merged model",
                where=f"instruction={instruction}",
                fix="leave it out, or measure the run or its export with export.format=live",
            )
        report = evaluate_merged(exported, config, say=say, progress=progress)
    else:
        live = load_exported(exported)
        report = evaluate_pair(
            live.model,
            live.tokenizer,
            prepare_heldout(config.data, live.tokenizer).heldout,
            config.evaluation,
            source=live.source if instruction is None else one_for_all(live.source, instruction),
            device=live.device,
            dtype=live.dtype,
            fresh_base=partial(load_base, config.model, config.quantization, device=live.device),
            progress=progress,
        )
    base_model = exported.base if report["base"] is not None else None
    return {"model": str(folder), "format": exported.format, "base_model": base_model, **report}


def evaluate_merged(
    exported: Exported, config: Config, *, say: Callable[[str], None], progress: EvalProgress | None
) -> dict[str, Any]:
    """A merged model and its base, one after the other: only one of them is in memory.

    The base is quantised as it was in training; the merged weights hold the same values, dequantised.
    """
    device = pick_device()
    dtype = compute_dtype(config.model.compute_dtype, device)
    tokenizer = load_tokenizer(config.model)
    rows = prepare_heldout(config.data, tokenizer).heldout

    def measured(config: Config, name: str) -> Measured:
        model = load_base(config.model, config.quantization, device=device)
        told = prefixed(progress, name)
        return measure(model, tokenizer, rows, config.evaluation, device=device, dtype=dtype, progress=told)

    base = None
    if not exported.base_known:
        say(
            f"the base, {exported.base}, was a local model, whose place is not recorded, so it is not measured; "
            f"name it with export.path={exported.path} model.path=FOLDER_OF_{exported.base}"
        )
    else:
        try:
            base = measured(config, "base")
        except UserError as error:
            if exported.overridden("model.path"):
                raise
            say(f"the base is not measured: {error.findings[0]}")
    merged = replace(config.model, path=str(exported.path), revision=None)
    tuned = measured(replace(config, model=merged, quantization=exported.merged_quantization), "tuned")
    if base is None:
        return by_itself(tuned, rows, config.evaluation, tokenizer)
    return side_by_side(base, tuned, rows, config.evaluation, tokenizer)
