"""What goes wrong when a model or tokenizer is loaded, in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError

from qmemtune.errors import UserError, first_line
from qmemtune.models.sources import Source


@contextmanager
def explained(source: Source, where: str = "model.path") -> Iterator[None]:
    """Turn the known failures of ``from_pretrained`` inside this context into :class:`UserError`.

    Failures that are not known here pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        found = _explain(error, source, where)
        if found is None:
            raise
        raise found from error


def _explain(error: BaseException, source: Source, where: str) -> UserError | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"{source.origin} does not fit into the GPU's memory",
            where=where,
            fix="use quantization=nf4, a smaller model, or free the GPU",
        )
    if "trust_remote_code" in text:
        return UserError(
            f"{source.origin} brings Python code of its own, which is not run unless you allow it",
            where=where,
            fix="read that code, then set model.trust_remote_code=true",
        )
    if isinstance(error, SafetensorError):
        return UserError(f"a weights file of {source.origin} is damaged: {text}", where=where, fix="copy it again")
    if isinstance(error, ImportError):
        return UserError(f"{source.origin} needs a package that is missing: {first_line(error)}", where=where)
    if "Unrecognized configuration class" in text:
        return UserError(
            f"{source.origin} is not a causal language model", where=where, fix="choose a decoder-only model"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UserError(
            f"{source.origin} has an architecture that the installed transformers does not know",
            where=where,
            fix="upgrade transformers, or choose another model",
        )
    return _hub_failure(error, source, where)


def _hub_failure(error: BaseException, source: Source, where: str) -> UserError | None:
    if source.is_local:
        if isinstance(error, OSError):
            return UserError(f"{source.origin} cannot be loaded: {first_line(error)}", where=where)
        return None
    for cause in _causes(error):
        if isinstance(cause, hub.GatedRepoError):
            return UserError(
                f"{source.origin} is gated on the hub",
                where=where,
                fix=f"accept its terms at https://huggingface.co/{source.location}, then run `hf auth login`",
            )
        if isinstance(cause, hub.RevisionNotFoundError):
            return UserError(
                f"{source.origin} has no revision {source.revision!r}",
                where="model.revision",
                fix="give a branch, tag or full commit",
            )
        if isinstance(cause, hub.RepositoryNotFoundError | hub.HFValidationError):
            return UserError(
                f"no model {source.origin} on the hub (or it is private), and no folder of this name here",
                where=where,
                fix="check the name; for a private model run `hf auth login`; for a local one give its folder",
            )
        if isinstance(cause, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | ConnectionError):
            return _unreachable(source, where)
    if isinstance(error, OSError):
        if "safetensors" in str(error):
            return UserError(
                f"{source.origin} has no safetensors weights; pickled ones are refused, since loading can run code",
                where=where,
                fix="choose a model or revision with safetensors weights",
            )
        if "connect" in str(error) or "offline" in str(error).lower():
            return _unreachable(source, where)
        return UserError(f"{source.origin} cannot be loaded: {first_line(error)}", where=where)
    return None


def _unreachable(source: Source, where: str) -> UserError:
    return UserError(
        f"{source.origin} is not in the local cache and the hub cannot be reached (or offline mode is on)",
        where=where,
        fix="connect and unset HF_HUB_OFFLINE, or give a local folder or GGUF file with model.path=",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
