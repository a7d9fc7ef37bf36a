"""GGUF files: converted once into a safetensors folder that every later run loads directly."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock

from qmemtune.errors import UserError
from qmemtune.rundir import cache_root

logger = logging.getLogger(__name__)

LAYOUT = 1
"""Counts changes to what a converted folder holds; part of its name."""

FULL_PRECISION_LIMIT = 1 << 30
"""Bytes of a GGUF file up to which its weights are stored in float32 (see :func:`_storage_dtype`)."""


def models_root() -> Path:
    """Folder of converted models."""
    return cache_root() / "models"


def converted(file: Path) -> Path:
    """The safetensors folder of a GGUF file, made on first use (tens of seconds), with tokenizer and chat template.

    The folder's name holds a digest of the file's bytes and of the converter's versions. It appears by renaming, whole
    or not at all; processes that ask at once wait for one of them.

    Raises:
        UserError: not a GGUF file, an architecture that transformers cannot read from GGUF, or no room in the cache.
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


def _convert(file: Path, folder: Path) -> None:
    """Write ``folder`` from ``file``; the caller holds the lock, so a partial folder found here is abandoned."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=_storage_dtype(file))
        # The weights are plain tensors now; what still calls them GGUF would keep transformers from saving them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(partial)
        del model
        AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
        partial.rename(folder)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"transformers cannot read this GGUF file: {error}",
            where=str(file),
            fix="use the model's safetensors folder or hub id instead",
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("converted in %.1f s", time.perf_counter() - start)
