"""A GGUF file of a merged model, through llama.cpp's own converter where that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qmemtune.data.collate import Collator
from qmemtune.data.rows import IGNORED
from qmemtune.data.targets import shifted_targets
from qmemtune.engine.restore import LoadedRun
from qmemtune.errors import RunFailed, UserError
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import label_logprobs, to_device
from qmemtune.export.fidelity import Comparison
from qmemtune.models.hardware import autocast

CONVERTER = "convert_hf_to_gguf.py"
FOLDER = "LLAMA_CPP"
"""Environment variable that names a checkout of llama.cpp."""
BINDING = "llama_cpp"


def find_converter() -> Path:
    """llama.cpp's converter, on the path or in ``$LLAMA_CPP``.

    Raises:
        UserError: it is not there; the message says what to install.
    """
    folder = os.environ.get(FOLDER)
    found = Path(folder).expanduser() / CONVERTER if folder else None
    if found is not None and found.is_file():
        return found
    on_path = shutil.which(CONVERTER)
    if on_path is None:
        raise UserError(
            f"a GGUF file needs llama.cpp's converter, {CONVERTER}, which is not installed",
            where="export.gguf",
            fix=f"install llama.cpp (conda install -c conda-forge llama.cpp), or clone it, install its requirements and"
            f" set {FOLDER} to the folder",
        )
    return Path(on_path)


def write_gguf(converter: Path, model: Path, kind: str) -> Path:
    """Convert a merged folder.

    Args:
        converter: what :func:`find_converter` found.
        model: the merged folder.
        kind: f32, f16, bf16 or q8_0.

    Returns:
        The file, in ``model``.

    Raises:
        RunFailed: the converter failed.
    """
    file = model / f"model-{kind}.gguf"
    command = [str(converter), str(model), "--outtype", kind, "--outfile", str(file)]
    if converter.suffix == ".py" and not os.access(converter, os.X_OK):
        command.insert(0, sys.executable)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RunFailed(f"{CONVERTER} failed: {lines[-1] if lines else done.returncode}", where=str(converter))
    return file


def gguf_fidelity(file: Path, live: LoadedRun, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Compare a GGUF file with the live model through llama.cpp's Python binding.

    Returns:
        As :func:`~qmemtune.export.fidelity.fidelity`; None where the binding is not installed.
    """
    if find_spec(BINDING) is None:
        return None
    from llama_cpp import Llama

    longest = max(len(row["input_ids"]) for row in rows)
    exported = Llama(model_path=str(file), n_ctx=longest + 1, logits_all=True, verbose=False)
    collate, cast = Collator(live.tokenizer.pad_token_id), partial(autocast, live.device, live.dtype)
    comparison = Comparison()
    with undisturbed(live.model):
        for row in rows:
            batch = to_device(collate([dict(row)]), live.device)
            targets = shifted_targets(batch["labels"])[0].cpu()
            labelled = targets != IGNORED
            of_live = torch.cat(list(label_logprobs(live.model, batch, source=live.source, autocast=cast))).cpu()
            exported.reset()
            exported.eval(list(row["input_ids"]))
            scores = torch.as_tensor(exported.scores[: len(row["input_ids"])], dtype=torch.float32)
            comparison.add(of_live, scores[labelled].log_softmax(dim=-1), targets[labelled])
    return comparison.result(len(rows))
