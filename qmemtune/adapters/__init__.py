"""Adapters: ordinary LoRA through PEFT, and the queryable memory.

Importing this package makes PEFT know the queryable memory.
"""

from qmemtune.adapters.build import apply_adapter, auxiliary_loss, check_targets, describe, parameter_groups
from qmemtune.adapters.instructions import InstructionSource, prompts_of
from qmemtune.adapters.methods import check_method
from qmemtune.adapters.queryable import QueryableMemoryConfig, memory_of

__all__ = [
    "InstructionSource",
    "QueryableMemoryConfig",
    "apply_adapter",
    "auxiliary_loss",
    "check_method",
    "check_targets",
    "describe",
    "memory_of",
    "parameter_groups",
    "prompts_of",
]
