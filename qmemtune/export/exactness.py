"""Which form of a run is exact, which one approximate, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from qmemtune.config.adapters import MethodConfig
from qmemtune.config.export import LIVE_FORMATS
from qmemtune.config.schema import Config
from qmemtune.engine.restore import require_adapter
from qmemtune.errors import UserError
from qmemtune.export.destination import destination, is_taken
from qmemtune.models.configs import read_config
from qmemtune.models.loading import refuse_stored_quantised
from qmemtune.models.sources import resolve
from qmemtune.rundir import RunDir

FORMATS = ("live", "lora", "merged")
ROUTED = "the memory routes each token by itself, and one static update a layer stands in for all routes"
INT8 = "the live model rounds activations to 8 bits and the merged one does not"
ORIGINAL = "the adapter was trained beside the quantised base, not the original one"


@dataclass(frozen=True)
class Exactness:
    """How an export relates to the live model."""

    kind: Literal["exact", "approximate", "impossible"]
    """Exact means: the live model's function, up to rounding."""
    why: str

    @property
    def exact(self) -> bool:
        return self.kind == "exact"


def exactness(config: Config, form: str) -> Exactness:
    """What a form of the export is, as far as the config tells."""
    quantised = config.quantization.kind != "none"
    if form in LIVE_FORMATS:
        return Exactness("exact", "the adapter as trained")
    if config.adapter.kind == "queryable":
        return Exactness("approximate", ROUTED)
    if form == "lora":
        beside = f" on a base quantised to {config.quantization.kind}" if quantised else ""
        return Exactness("exact", f"the adapter as trained is a LoRA; serve it{beside}")
    if config.quantization.kind == "int8":
        return Exactness("approximate", INT8)
    if quantised and config.export.base == "original":
        return Exactness("approximate", ORIGINAL)
    if quantised:
        return Exactness("exact", "the update is added to the dequantised weights it was trained beside")
    return Exactness("exact", "the update is added to the weights")


def folds(config: Config) -> bool:
    """Whether the export that is asked for has static updates in place of routes."""
    return config.adapter.kind == "queryable" and not config.export.is_live


def rank_of(config: Config) -> int:
    """Of the LoRA that an export writes or merges."""
    distilled = config.adapter.kind == "queryable" and config.export.fold == "distill"
    return (config.export.rank if distilled else None) or config.adapter.r


def require_exportable(run: RunDir, config: Config) -> None:
    """See whether a run can be exported in any form.

    Raises:
        UserError: it is not finished, or its adapter is there for comparison only.
    """
    if isinstance(config.adapter, MethodConfig):
        raise UserError(
            "adapter=peft is for comparisons and has no export of its own",
            where=str(run.adapter),
            fix="that folder is a PEFT adapter already: PeftModel.from_pretrained loads it",
        )
    require_adapter(run)


def plan(run: RunDir, config: Config) -> dict[str, Any]:
    """What each format would be for a run, and what the export that is asked for would do; nothing is written.

    Returns:
        ``run_dir``; under ``formats`` for each one ``kind`` (exact, approximate, impossible), ``why`` and ``path``;
        under ``export`` the ``format`` asked for, its ``path`` and whether something is there already (``taken``), of
        a memory made static ``fold`` and ``rank``, and the ``base`` a quantised run is merged into.
    """
    export = config.export
    formats = {}
    for form in FORMATS:
        found = exactness(config, form)
        problem = obstacle(run, config, form)
        if problem is not None:
            found = Exactness("impossible", problem)
        path = destination(run, replace(export, format=form))  # type: ignore[arg-type]
        formats[form] = {"kind": found.kind, "why": found.why, "path": str(path)}
    path = destination(run, export)
    asked: dict[str, Any] = {"format": export.format, "path": str(path), "taken": is_taken(path)}
    if folds(config):
        asked["fold"] = export.fold
        asked["rank"] = rank_of(config)
    if config.quantization.kind != "none" and export.format == "merged":
        asked["base"] = export.base
    return {"run_dir": str(run.path), "formats": formats, "export": asked}


def obstacle(run: RunDir, config: Config, form: str) -> str | None:
    """What stands in the way of a form; None for nothing."""
    try:
        require_exportable(run, config)
        if form != "merged":
            return None
        source = resolve(config.model.path, config.model.revision)
        refuse_stored_quantised(source, read_config(source, config.model))
    except UserError as error:
        return error.findings[0].problem
    return None
