"""The files of a base model: its weights, and what belongs beside them in a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from qmemtune.errors import UserError
from qmemtune.export.shards import Shard, read_shard
from qmemtune.models.failures import explained
from qmemtune.models.sources import INDEX, SINGLE, Source, weight_files
from qmemtune.rundir import write_json

KEPT = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
)
CODE = "*.py"
"""A model's own Python code; kept only where its config names it."""


def end_generation_at(folder: Path, tokens: Sequence[int]) -> None:
    """Let servers end an answer at these tokens too: a base model's own end of text is often another than a chat's.

    Args:
        folder: a model's, with its config.json; its generation_config.json is written if it does not say so yet.
        tokens: their ids.
    """
    file = folder / KEPT[0]
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ends = content.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if new := [token for token in dict.fromkeys(tokens) if token not in ends]:
        write_json(file, {**content, "eos_token_id": [*ends, *new]})


@dataclass(frozen=True)
class BaseFiles:
    """A base model on this machine's disk."""

    folder: Path
    shards: list[Shard]
    index: dict[str, Any] | None
    """The content of the index of several shards."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return [tensor.name for shard in self.shards for tensor in shard.tensors]

    def copy_beside(self, folder: Path, *, tokenizer: bool) -> None:
        """Copy what is no weight, byte for byte; the config is :meth:`write_config`'s.

        Args:
            tokenizer: also the tokenizer's files and chat templates.
        """
        patterns = [*KEPT, *(TOKENIZER if tokenizer else ())]
        if "auto_map" in self.config():
            patterns.append(CODE)
        for pattern in patterns:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file():
                    target = folder / file.relative_to(self.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        content: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return content

    def write_config(self, folder: Path, *, dtype: torch.dtype | None, untied: bool) -> None:
        """Write config.json with what the new weights make different, and nothing else.

        Args:
            dtype: the weights' new data type; None for the old one.
            untied: whether the output head now has weights of its own.
        """
        config = self.config()
        config.pop("_name_or_path", None)  # of old versions: a place on somebody's machine
        parts = [config] + [part for part in config.values() if isinstance(part, dict)]
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if dtype is not None and key in part:
                    part[key] = str(dtype).removeprefix("torch.")
            if untied and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
        if dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
            config["torch_dtype"] = str(dtype).removeprefix("torch.")
        if untied:
            config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def write_index(self, folder: Path, sizes: Mapping[str, int], files: Mapping[str, str]) -> None:
        """Write the index of several shards; nothing for a single file.

        Args:
            sizes: bytes of each tensor.
            files: name of the file that holds it.
        """
        if self.index is None:
            return
        metadata = {**self.index.get("metadata", {}), "total_size": sum(sizes.values())}
        content = {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_base(source: Source) -> BaseFiles:
    """Find a base model's files, in the cache of the hub too, and read the headers of its weights.

    Raises:
        UserError: they are not there or not whole.
    """
    folder, names, index = weights_of(source)
    return BaseFiles(folder, [read_shard(folder / name) for name in names], index)


def weights_of(source: Source) -> tuple[Path, list[str], dict[str, Any] | None]:
    """A base model's folder, the names of its weight files, and the content of their index if there are several.

    Raises:
        UserError: they are not there.
    """
    folder = Path(source.location)
    if not source.is_local:
        with explained(source):
            folder = _from_hub(source)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = weight_files(index, source.origin)
    elif (folder / SINGLE).is_file():
        index, names = None, [SINGLE]
    else:
        raise UserError(f"{source.origin} holds neither {SINGLE} nor {INDEX}", where="model.path")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{source.origin} lacks {missing[0]}", where="model.path", fix="is the copy whole?")
    return folder, names, index


def _from_hub(source: Source) -> Path:
    """The model's folder in the hub's cache, with its weights; they are there already if the run used them here."""
    revision = source.revision or "main"
    index = cached_file(source.location, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    weights = [SINGLE]
    if index is not None:
        weights = weight_files(json.loads(Path(index).read_text(encoding="utf-8")), source.origin)
    patterns = ["config.json", INDEX, *weights, *KEPT, *TOKENIZER, CODE]
    return Path(snapshot_download(source.location, revision=revision, allow_patterns=patterns))
