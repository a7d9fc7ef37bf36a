"""Silence what libraries print, by their own switches. Call before they are imported; --debug leaves them be.

A process that is started anew has its parent's environment, but neither its filters of warnings nor its levels of logs:
give it :func:`as_here`'s answer, and let it call :func:`like_parent`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "filelock",
    "fsspec",
    "gguf",
    "httpx",
    "huggingface_hub",
    "peft",
    "sentence_transformers",
    "torch",
    "transformers",
    "trl",
    "urllib3",
)


_silenced = False


def silence(*, debug: bool, quiet: bool) -> None:
    """Errors only from libraries; download bars only on a terminal."""
    # One process tokenises at a time here; the library would warn about every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    global _silenced
    _silenced = not debug
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\..*)?$")
    # A model's step without numbers may fail; this one logs that as an error of its own, with a traceback.
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True


def as_here() -> bool:
    """Whether libraries are silenced in this process."""
    return _silenced


def like_parent(silenced: bool) -> None:
    """Silence libraries in a new process, before it imports them, if they are in the one that started it.

    Args:
        silenced: :func:`as_here` there.
    """
    if silenced:
        # Where a terminal may show bars of downloads has been settled in the environment.
        silence(debug=False, quiet=False)


def hide_loading_bars() -> None:
    """No bar for every file of weights that transformers reads or writes; downloads keep theirs on a terminal.

    transformers has no variable for this: call it once the library is imported.
    """
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
