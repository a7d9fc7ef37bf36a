"""A plain Hugging Face folder: the base model with the adapter's update added to its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qmemtune.adapters.queryable.fold import FoldedLayer
from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.engine.restore import LoadedRun
from qmemtune.models.bitsandbytes import dequantised_weight, is_quantised
from qmemtune.models.loading import load_unquantised

INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora")


def write_merged(
    folder: Path, live: LoadedRun, folded: Mapping[str, FoldedLayer] | None, dtype: torch.dtype | None
) -> torch.dtype:
    """Merge and save.

    Every weight that the run kept quantised is written dequantised, adapted or not: that is the weight the adapter was
    trained beside, so the merged model computes what the live one does, up to rounding. Other weights come from the
    base model's files. One layer at a time is in float32.

    Args:
        folded: static factors of a queryable memory; ``None`` for LoRA.
        dtype: of the written weights; that of the base model's files if not given.

    Returns:
        The data type written.
    """
    full = load_unquantised(live.config.model, dtype)
    base = live.model.get_base_model()
    with torch.no_grad():
        for path, module in list(base.named_modules()):
            if isinstance(module, LoraLayer | QueryableLinear):
                own = cast(BaseTunerLayer, module).get_base_layer()
                weight = _base_weight(live, own, path, full)
                weight = weight + _update(module, own, weight, folded[path] if folded else None)
                _store(full, path, weight, transpose=is_quantised(own))
            elif is_quantised(module) and not path.endswith(".base_layer"):
                _store(full, path, dequantised_weight(module), transpose=True)
    full.save_pretrained(folder)
    written: torch.dtype = full.dtype
    return written


def _base_weight(live: LoadedRun, own: nn.Module, path: str, full: PreTrainedModel) -> Tensor:
    """The weight that the adapter was trained beside, float32, as the live base layer is laid out; on the CPU."""
    if is_quantised(own):
        return dequantised_weight(own).cpu()
    changed = getattr(live.config.adapter, "init", None) in INITS_THAT_CHANGE_THE_BASE
    weight: Any = (own if changed else full.get_submodule(path)).weight
    return weight.detach().float().cpu()


def _update(layer: Any, own: nn.Module, weight: Tensor, folded: FoldedLayer | None) -> Tensor:
    """What the active adapters add to ``weight``, float32, laid out like it; on the CPU."""
    if folded is not None:
        delta = folded.scaling * (folded.lora_B @ folded.lora_A)
        return (delta.T if isinstance(own, Conv1D) else delta).cpu()
    updates = [lora_update(layer, name, weight) for name in layer.active_adapters if name in layer.lora_A]
    return torch.stack(updates).sum(dim=0)


def lora_update(layer: LoraLayer, name: str, weight: Tensor) -> Tensor:
    """What a LoRA adapter adds to ``weight``, the weight of its base layer; float32, on the CPU.

    DoRA scales each row of the sum to a learned length; a row is an output feature.
    """
    delta: Tensor = layer.get_delta_weight(name).detach().float().cpu()
    if name not in layer.lora_magnitude_vector:
        return delta
    length = layer.lora_magnitude_vector[name].weight.detach().float().cpu()
    along, shape = (0, (1, -1)) if layer.fan_in_fan_out else (1, (-1, 1))
    whole = weight + delta
    return whole * (length / whole.norm(dim=along)).view(shape) - weight


def _store(full: PreTrainedModel, path: str, weight: Tensor, *, transpose: bool) -> None:
    """Put a weight into the model to be saved; ``transpose`` if a ``Conv1D`` there wants it the other way round."""
    target: Any = full.get_submodule(path)
    if transpose and isinstance(target, Conv1D):
        weight = weight.T
    if target is full.get_output_embeddings() and target.weight is full.get_input_embeddings().weight:
        # An update of a tied head must not reach the input embeddings.
        full.config.tie_word_embeddings = False
        full.all_tied_weights_keys = {}
    weight = weight.to(target.weight.device, target.weight.dtype).contiguous()
    target.weight = nn.Parameter(weight, requires_grad=False)
