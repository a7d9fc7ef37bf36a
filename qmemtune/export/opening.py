"""Opens an exported folder: what it is, its settings, and its model where it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmemtune.config.compose import Composed, compose
from qmemtune.config.interpolate import escape
from qmemtune.config.model import QuantizationConfig
from qmemtune.config.schema import Config
from qmemtune.engine.restore import LoadedModel, load_adapted, load_whole
from qmemtune.errors import UserError
from qmemtune.export.marker import MARKER, read_marker
from qmemtune.export.pin import check_base
from qmemtune.nested import with_leaves


@dataclass(frozen=True)
class Exported:
    """An exported folder with the settings to measure it."""

    path: Path
    format: str
    composed: Composed
    """Base model, quantisation, rows and evaluation: the marker's, with overrides on top."""
    base: str
    """The base's name, to show."""
    base_sha256: str | None
    """Digest of a local base's weights."""
    base_known: bool
    """Whether the config names the base: a local one has no place in a marker, and must be given."""

    @property
    def config(self) -> Config:
        return self.composed.config

    @property
    def merged_quantization(self) -> QuantizationConfig:
        """Of a merged model, which is not quantised as its base was in training unless an override says so."""
        return self.config.quantization if self.overridden("quantization.kind") else QuantizationConfig()

    def overridden(self, key: str) -> bool:
        """Whether an override, not the marker, set a key."""
        return self.composed.provenance[key] not in (str(self.path / MARKER), "default")


def open_exported(folder: Path, overrides: Sequence[str], *, needs_data: bool = True) -> Exported:
    """Read the marker of an exported folder.

    Args:
        folder: what ``merge-export`` wrote.
        overrides: as of :func:`~qmemtune.config.compose.compose`; ``model.path`` names the base.
        needs_data: whether the files of rows must be at hand.

    Raises:
        UserError: the folder has no usable marker, the overrides are wrong, or an adapter's base must be given.
    """
    file = folder / MARKER
    content = read_marker(folder)
    if content is None:
        raise UserError(
            f"not an exported folder: it holds no {MARKER}",
            where=str(folder),
            fix="give a folder that `qmemtune merge-export` wrote, or a whole model with model.path=",
        )
    try:
        origin, form = content["base"], content["format"]
        name, local = origin["source"], origin.get("local", False)
        # Only these sections: a folder from somebody else must not decide what code runs here.
        start = {section: content.get(section, {}) for section in ("data", "evaluation", "quantization")}
        if not needs_data and "form" in content:
            # For data.format=auto, rows would show it. Earlier versions did not write it.
            start["data"] = {**start["data"], "format": content["form"]}
        # A local base is in no known place: the folder itself stands in for it until the user names it.
        start["model"] = {
            "path": str(folder) if local else name,
            "revision": origin["revision"],
            "compute_dtype": origin.get("compute_dtype", "auto"),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not the marker of an exported folder ({error})", where=str(file)) from error
    composed = compose(overrides, base=plain_text(start), base_name=str(file), needs_data=needs_data)
    given = composed.provenance["model.path"] != str(file)
    base = composed.config.model.path if given else name
    found = Exported(folder, form, composed, base, origin.get("sha256") if local else None, given or not local)
    if not found.base_known and form != "merged":
        raise UserError(
            f"this adapter's base, {name}, was a local model, whose place is not recorded",
            where=str(folder),
            fix=f"name it: export.path={folder} model.path=FOLDER_OF_{name}",
        )
    return found


def plain_text(value: Any) -> Any:
    """Values of a marker such that no text in them is taken for a reference to a key."""
    return with_leaves(value, lambda leaf: escape(leaf) if isinstance(leaf, str) else leaf)


def load_exported(exported: Exported) -> LoadedModel:
    """The model of an exported folder, to be asked.

    Raises:
        UserError: it cannot be loaded, or the base given for an adapter is another one.
    """
    config, folder = exported.config, exported.path
    tokenizer = config.model.tokenizer or str(folder)
    if exported.format == "merged":
        model = replace(config.model, path=str(folder), revision=None, tokenizer=tokenizer)
        return load_whole(replace(config, model=model, quantization=exported.merged_quantization))
    check_base(config.model, exported.base_sha256, folder)
    return load_adapted(folder, replace(config, model=replace(config.model, tokenizer=tokenizer)))
