"""GGUF files: converted once into a safetensors folder that every later run loads directly."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import shutil
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from qmemtune.errors import UserError, first_line
from qmemtune.rundir import cache_root

logger = logging.getLogger(__name__)

LAYOUT = 3
"""Counts changes to what a converted folder holds or is refused for; part of its name."""

FULL_PRECISION_LIMIT = 1 << 30
"""Bytes of a GGUF file up to which its weights are stored in float32 (see :func:`_storage_dtype`)."""

ROTARY = re.compile(r"rope_freqs|rope_factors_|attn_rot_embd")
"""Tensors that hold how positions are rotated: no weights, and what scales them is judged by itself."""

PART = re.compile(r"-\d{5}-of-(\d{5})$")
"""How the name of one part of a split file ends, before its suffix."""

OTHER_SOURCE = "give the model's safetensors folder or hub id"


def models_root() -> Path:
    """Folder of converted models."""
    return cache_root() / "models"


def converted(file: Path) -> Path:
    """The safetensors folder of a GGUF file, made on first use (tens of seconds), with tokenizer and chat template.

    The folder's name holds a digest of the file's bytes and of the converter's versions. It appears by renaming, whole
    or not at all; processes that ask at once wait for one of them.

    Raises:
        UserError: not a GGUF file, one part of a split file, a file that transformers cannot read, or reads only in
            part (weights, scaled rotary positions), or no room in the cache.
    """
    _check(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(f"|{version('transformers')}|{version('gguf')}|{LAYOUT}".encode())
    folder = models_root() / f"{file.stem}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert(file, folder)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"cannot write the cache of converted models: {error.strerror}",
            where=str(models_root()),
            fix="set QMEMTUNE_CACHE to a folder that can be written",
        ) from error
    return folder


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError("not a GGUF file", where=str(file), fix="is it a whole download, not a pointer file?")
    if find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf", where=str(file), fix="run `pip install gguf`")


def _storage_dtype(file: Path) -> torch.dtype:
    # Dequantised values (scale * integer + offset) have more bits than a 16-bit type holds. Measured on SmolLM2-135M
    # Q4_1 against float32: float16 changes 48 % of the weights, mean KL of the next token 3e-6; bfloat16 82 %, 2e-4.
    # So float32, exact and read in place without a cast, where it is small; float16 for large files, where twice the
    # disk and memory would cost more than that error.
    return torch.float32 if file.stat().st_size <= FULL_PRECISION_LIMIT else torch.float16


def _refuse_part(file: Path, reader: Any) -> None:
    name = PART.search(file.stem)
    count = reader.get_field("split.count")
    parts = max(int(name[1]) if name else 1, count.contents() if count else 1)
    if parts > 1:
        raise UserError(
            f"one of the {parts} parts of a split GGUF file",
            where=str(file),
            fix="merge its parts with llama-gguf-split --merge",
        )


def _rope_scalings(reader: Any) -> list[dict[str, Any]]:
    """How the file scales its rotary positions, each as what a config's ``rope_parameters`` would have to hold."""
    arch = reader.fields["general.architecture"].contents()

    def value(key: str, default: Any) -> Any:
        field = reader.get_field(f"{arch}.rope.{key}")
        return field.contents() if field else default

    found: list[dict[str, Any]] = []
    # As llama.cpp reads it: a factor without a type is linear, and zero is no factor.
    kind, factor = value("scaling.type", "linear"), value("scaling.factor", value("scale_linear", 0.0)) or 1.0
    if kind == "longrope":
        found.append({"rope_type": kind})
    elif kind != "none" and (kind, factor) != ("linear", 1.0):
        found.append({"rope_type": kind, "factor": factor})
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_factors_"):
            found.append({"rope_type": "longrope"})
        elif tensor.name == "rope_freqs.weight" and (tensor.data != 1).any():
            # Gemma 4 stops part of the rotations with divisors of 1e30; Llama 3 stretches them by small ones.
            kept = tensor.data == 1
            stopped = bool((kept | (tensor.data > 1e9)).all())
            found.append(
                {"rope_type": "proportional", "partial_rotary_factor": float(kept.mean())}
                if stopped
                else {"rope_type": "llama3"}
            )
    return found


def _carries(config: Any, scaling: dict[str, Any]) -> bool:
    """Whether a config has a scaling, in all layers or in those of one type."""
    rope = getattr(config, "rope_parameters", None) or {}

    def same(held: Any, wanted: Any) -> bool:
        # The file holds its factors in 32 bits.
        return math.isclose(held, wanted, rel_tol=1e-6) if isinstance(held, int | float) else held == wanted

    return any(
        all(same(entry.get(key), wanted) for key, wanted in scaling.items())
        for entry in (rope, *rope.values())
        if isinstance(entry, dict)
    )


def left_out(reader: Any, model: Any) -> int:
    """How many numbers of a file's weights the model made of it has no place for.

    Counted, because transformers passes over tensors that it cannot name without a word, and its table of names is not
    public; every conversion that it knows keeps the number of elements.
    """
    # Falcon and Bloom are tied even where the file has the head's copy.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    held = sum(
        int(tensor.n_elements)
        for tensor in reader.tensors
        if not (ROTARY.search(tensor.name) or (tied and tensor.name == "output.weight"))
    )
    kept = {value.data_ptr(): value.numel() for value in model.state_dict().values()}
    return held - sum(kept.values())


def _check_whole(file: Path, reader: Any, model: Any, info: dict[str, Any]) -> None:
    # transformers fills what is missing at random, and a folder saved from that looks whole to every later run.
    missing = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    # transformers 5.17 takes a weight of another shape from a GGUF file as it is, and reports nothing.
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in type(model)(model.config).state_dict().items()}
    missing += [key for key, value in model.state_dict().items() if value.shape != shapes[key]]
    if missing:
        raise UserError(
            f"transformers does not find all weights in this GGUF file: {len(missing)} are missing or of another shape,"
            f" {missing[0]} first",
            where=str(file),
            fix=f"is it a whole download? else {OTHER_SOURCE}",
        )
    extra = left_out(reader, model)
    if extra > 0:
        raise UserError(
            f"this GGUF file holds weights of {extra:,} numbers that transformers has no place for in a"
            f" {type(model).__name__}; the conversion would lose them",
            where=str(file),
            fix=OTHER_SOURCE,
        )


def _convert(file: Path, folder: Path) -> None:
    """Write ``folder`` from ``file``; the caller holds the lock, so a partial folder found here is abandoned."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # A warning, because it must be seen without any logging set-up: nothing else explains the wait.
    logger.warning("converting %s to safetensors, once, into %s", file.name, folder)
    start = time.perf_counter()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        reader = GGUFReader(file)
        _refuse_part(file, reader)
        scalings = _rope_scalings(reader)
        if scalings:
            config = AutoConfig.from_pretrained(**place)
            if not all(_carries(config, scaling) for scaling in scalings):
                raise UserError(
                    "this GGUF file scales its rotary positions, which the conversion would lose",
                    where=str(file),
                    fix=OTHER_SOURCE,
                )
        model, info = AutoModelForCausalLM.from_pretrained(
            **place, dtype=_storage_dtype(file), output_loading_info=True, ignore_mismatched_sizes=True
        )
        _check_whole(file, reader, model, info)
        # The weights are plain tensors now; what still calls them GGUF would keep transformers from saving them.
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(partial)
        del model
        AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
        partial.rename(folder)
    except (ValueError, KeyError, IndexError, NotImplementedError, TypeError) as error:
        # TypeError: transformers stumbles over the scaling of gpt-oss.
        raise UserError(
            f"transformers cannot read this GGUF file: {first_line(error)}", where=str(file), fix=OTHER_SOURCE
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("converted in %.1f s", time.perf_counter() - start)
