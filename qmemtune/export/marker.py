"""``qmemtune.json`` in an exported folder: what it is and what it was made from, fit to be published."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from qmemtune import __version__
from qmemtune.config.data import DataConfig
from qmemtune.config.schema import Config
from qmemtune.data.render import form_of
from qmemtune.models.sources import PACKAGE, Source
from qmemtune.nested import with_leaves
from qmemtune.rundir import EXPORT_MARKER, read_json, write_json

MARKER = EXPORT_MARKER


def marker(config: Config, source: Source, result: dict[str, Any]) -> dict[str, Any]:
    """The content of the marker file.

    Args:
        source: the base model's.
        result: what the export reports; its ``path`` is left out.
    """
    kept = ("format", "exact", "note", "forced", "dtype", "fidelity", "calibration", "distillation", "gguf")
    return {
        "qmemtune": __version__,
        **{key: result[key] for key in kept if key in result},
        "base": {
            "source": source.origin,
            "revision": source.revision,
            # Such a name alone does not find the model again.
            "local": source.is_local and not source.origin.startswith(PACKAGE),
            "compute_dtype": config.model.compute_dtype,
            # A hub's model is pinned by its commit; a local one by its weights, where the export needs them.
            **({"sha256": result["base_sha256"]} if result.get("base_sha256") else {}),
        },
        "quantization": asdict(config.quantization),
        "adapter": public(asdict(config.adapter)),
        "data": data_options(config.data),
        # Where the export is, no rows may be at hand that say how a prompt is rendered.
        "form": form_of(config.data),
        "evaluation": asdict(config.evaluation),
        "seed": config.seed,
    }


def data_options(data: DataConfig) -> dict[str, Any]:
    """The data options; only paths are shortened, for a template or pattern may begin with a slash, too."""
    sources = {name: asdict(source) | {"path": public(source.path)} for name, source in data.sources.items()}
    return asdict(data) | {"path": public(data.path), "eval_path": public(data.eval_path), "sources": sources}


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    """Write the marker of an exported folder."""
    write_json(folder / MARKER, content)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of an exported folder; ``None`` if it has none.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / MARKER
    return read_json(file) if file.is_file() else None


def public(value: Any) -> Any:
    """``value`` with every absolute path in it cut down to its last name."""
    return with_leaves(value, _last_name)


def _last_name(value: Any) -> Any:
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, str):
        for flavour in (PurePath, PureWindowsPath):
            path = flavour(value)
            if path.is_absolute() or value.startswith("~"):
                return path.name
    return value
