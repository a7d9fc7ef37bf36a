"""Load the base model and its tokenizer, ready for an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.errors import UserError
from qmemtune.models.bitsandbytes import bitsandbytes_config, keep_4bit_trainable
from qmemtune.models.configs import read_config
from qmemtune.models.dequantized import refuse_copies
from qmemtune.models.failures import explained
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.models.head import keep_head_input_contiguous
from qmemtune.models.sources import Source, resolve

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|PAD_TOKEN|>", "<|vision_pad|>")
"""Tokens that vocabularies keep for padding without always naming them so."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token, and with ``model.chat_template`` if that is set.

    The pad token is the tokenizer's own if it differs from the end token; else a token that the vocabulary keeps for
    padding; else the unknown token; else the end token. Apart from the end token, so that a collator which masks
    padding by id does not mask ends too. The vocabulary never grows.

    Raises:
        UserError: no tokenizer there, or the chat template is missing or malformed.
    """
    where = "model.tokenizer" if config.tokenizer else "model.path"
    revision = None if config.tokenizer else config.revision
    source = resolve(config.tokenizer or config.path, revision, weights=False, where=where)
    with explained(source, where):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source.location, revision=source.revision or "main", trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            if not source.is_local or "trust_remote_code" in str(error):
                raise
            raise UserError(
                f"{source.origin} holds no usable tokenizer", where=where, fix="name one with model.tokenizer="
            ) from error
    _set_pad_token(tokenizer)
    if config.chat_template is not None:
        _set_chat_template(tokenizer, Path(config.chat_template).expanduser())
    return tokenizer


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token
    if tokenizer.pad_token is not None and tokenizer.pad_token != eos:
        return
    vocabulary = tokenizer.get_vocab()
    kept = next((token for token in PAD_TOKENS if token in vocabulary), None)
    unknown = tokenizer.unk_token if tokenizer.unk_token != eos else None
    choice = kept or unknown or tokenizer.pad_token or eos
    if choice is None:
        raise UserError(
            "the tokenizer has no pad, unknown or end token, so rows of different lengths cannot form a batch",
            where="model.tokenizer",
            fix="set pad_token in its tokenizer_config.json",
        )
    tokenizer.pad_token = choice


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the chat template: {error}", where="model.chat_template") from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"not a Jinja template: {error.message} (line {error.lineno})", where="model.chat_template"
        ) from error
    except SecurityError as error:
        raise UserError(
            f"the chat template reaches beyond the conversation: {error}",
            where="model.chat_template",
            fix="a template may use messages, tools and Jinja's own functions",
        ) from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        # It may want another conversation than this one: that is found out where rows are rendered.
        return


def load_base(
    config: ModelConfig, quantization: QuantizationConfig, *, device: torch.device | None = None
) -> PreTrainedModel:
    """The base model: frozen, in eval mode, on ``device``, safe to train and to evaluate in any order.

    Args:
        config: where the model comes from, and the data type of its weights and products.
        quantization: how linear layers but the output head are stored.
        device: where to put it; :func:`~qmemtune.models.hardware.pick_device` chooses if not given.

    Raises:
        UserError: the model cannot be found, is not a causal language model, is already quantised in another way,
            or its files do not hold all of its weights.
    """
    device = device or pick_device()
    dtype = compute_dtype(config.compute_dtype, device)
    source = resolve(config.path, config.revision)
    bits = bitsandbytes_config(quantization, dtype)
    options: dict[str, Any] = {}
    with explained(source):
        own = _own_quantization(source, config)
        refuse_second_quantization(source.origin, own, quantization)
        if config.attn_implementation is not None:
            options["attn_implementation"] = config.attn_implementation
        if bits is not None:
            options["quantization_config"] = bits
        if bits is not None or own is not None or device.type != "cpu":
            options["device_map"] = {"": device}
        model = _from_pretrained(source, config, dtype, **options)
    if bits is not None and device.type == "cpu":
        copy_out_of_files(model)
    keep_4bit_trainable(model)
    keep_head_input_contiguous(model)
    if quantization.dequantized_copies == "never":
        refuse_copies(model)
    return model.requires_grad_(False).eval()


def copy_out_of_files(model: nn.Module) -> None:
    """Copy the weights that a quantised model holds as they were stored.

    Those of the type in which they are stored lie in the mapped file, and one of them (embeddings, a norm) keeps all
    of its pages in the process, those of the weights that were quantised too.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (nn.Parameter, torch.Tensor):
            tensor.data = tensor.data.clone()


def refuse_second_quantization(name: str, own: Any, quantization: QuantizationConfig) -> None:
    """Raise UserError where a model whose files are quantised is to be quantised in another way.

    Args:
        name: the model's.
        own: the quantisation in its config, or None.
        quantization: what is asked for.
    """
    if own is not None and quantization.kind != "none":
        raise UserError(
            f"{name} is stored quantised already",
            where="quantization.kind",
            fix="use quantization=none to keep its own form",
        )


def refuse_stored_quantised(source: Source, config: Any) -> None:
    """Refuse to merge into a model whose files hold no full weights.

    Args:
        source: the model.
        config: its ``PreTrainedConfig``.

    Raises:
        UserError: the files are stored quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{source.origin} is stored quantised, so there are no full weights to merge into",
            where="model.path",
            fix="use export.format=lora or live, or train on the unquantised model",
        )


def _own_quantization(source: Source, config: ModelConfig) -> Any:
    """The quantisation that the model's files are stored in, or ``None``."""
    return getattr(read_config(source, config), "quantization_config", None)


def _from_pretrained(source: Source, config: ModelConfig, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    # Else transformers would ask a service on the hub to convert a model that has only pickled weights.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    model, info = AutoModelForCausalLM.from_pretrained(
        source.location,
        revision=source.revision or "main",
        trust_remote_code=config.trust_remote_code,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    _check_whole(source, info)
    loaded: PreTrainedModel = model
    return loaded


def _check_whole(source: Source, info: dict[str, Any]) -> None:
    """Refuse weights that transformers would have filled in at random, with no more than a warning."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"the weights of {source.origin} do not fit its config: {len(missing)} are missing or of another shape,"
            f" {missing[0]} first",
            where="model.path",
            fix="is this a whole model with a causal language model's head?",
        )
