"""What LoRA initialisations that take their start out of the base's weights leave of them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from qmemtune.adapters.initialisation import changes_base


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.layer.weight = nn.Parameter(weight, requires_grad=False)


def changed_base(weight: Tensor, lora: Path, dtype: torch.dtype, *, transposed: bool) -> Tensor | None:
    """What the initialisation leaves of a base weight: PEFT does the same to the whole model when it loads.

    Args:
        weight: as in the file, (in_features, out_features) if ``transposed``.
        lora: the adapter's folder.
        dtype: the live model's, in which it is decomposed.

    Returns:
        The weight, float32, laid out as given; None if the initialisation leaves the base alone.
    """
    config = PeftConfig.from_pretrained(str(lora))
    if not isinstance(config, LoraConfig) or not changes_base(config):
        return None
    model = OneLayer((weight.T if transposed else weight).to(dtype).contiguous().clone())
    alone = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        target_modules=["layer"],
    )
    get_peft_model(model, alone)
    changed: Tensor = model.layer.get_base_layer().weight.detach().float()  # type: ignore[operator]
    return changed.T if transposed else changed
