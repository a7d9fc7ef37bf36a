"""A PEFT folder: the adapter as trained, or a folded memory as a standard LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from qmemtune.adapters.files import CONFIG, WEIGHTS
from qmemtune.adapters.queryable.fold import FoldedLayer
from qmemtune.errors import UserError
from qmemtune.models.sources import Source


def copy_adapter(adapter: Path, folder: Path, source: Source) -> None:
    """Copy a trained adapter unchanged, but name its base by what others can find.

    Raises:
        UserError: the run's adapter folder is not whole.
    """
    for name in (WEIGHTS, CONFIG):
        if not (adapter / name).is_file():
            raise UserError(f"the run's adapter holds no {name}", where=str(adapter), fix="is this a whole run folder?")
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    config.update(base_model_name_or_path=source.origin, revision=source.revision)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folded_lora(
    folder: Path, base: nn.Module, layers: Mapping[str, FoldedLayer], source: Source, *, dropout: float
) -> None:
    """Write static factors as a standard PEFT LoRA adapter, float32.

    Args:
        base: the base model, adapted or not; for the names and kinds of its layers.
        layers: path of each adapted layer in the base model -> its factors.
        dropout: the run's own, for those who train on.
    """
    first = next(iter(layers.values()))
    rank = first.lora_A.shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=first.scaling * rank,
        lora_dropout=dropout,
        target_modules=target_names(base, set(layers)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        base_model_name_or_path=source.origin,
        revision=source.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A.cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B.cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def target_names(base: nn.Module, adapted: set[str]) -> list[str]:
    """Names that select exactly the adapted layers: the short ones if they do, else full paths."""
    short = {path.rpartition(".")[2] for path in adapted}
    ends = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if ends == adapted else adapted)
