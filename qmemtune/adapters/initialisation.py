"""LoRA initialisations that take their start out of the base's weights (PiSSA, OLoRA)."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig

from qmemtune.config.adapters import INITS_FROM_WEIGHTS


def changes_base(config: PeftConfig) -> bool:
    """Whether an adapter's base, without the adapter, is not the base that it was put on."""
    return isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith(INITS_FROM_WEIGHTS)
