"""Codes for words, adapted in the last layers only: what a token becomes depends on it and on the command at once."""

from __future__ import annotations

import dataclasses

from qmemtune.study.baselines import peft_methods
from qmemtune.study.design import LOSS, ROW_ACCURACY, Match, Setting, Variant
from qmemtune.study.studies import instructions

QUERYABLE = (
    "adapter=queryable",
    "adapter.num_atoms=30",
    "adapter.block_size=1",
    "adapter.temperature=2",
    "adapter.init_core_std=0.2",
    "adapter.memory_learning_rate_multiplier=1",
    # Each variant's best of the grid on seeds 0-2.
    "optimizer.learning_rate=4e-2",
)
LORA = ("adapter=lora", "optimizer.learning_rate=1.6e-2")
PEFT_RATES = {"dora": 6e-2, "vera": 6e-2, "vblora": 4e-2, "lily": 4e-2}
"""The best of 8e-3, 1.6e-2 and 4e-2 on seed 0, and of 6e-2 too, save for VB-LoRA."""

STUDY = dataclasses.replace(
    instructions.STUDY,
    name="codes",
    title="Four codes for words, adapted in the last three layers",
    about=(
        "SmolLM2-135M on an NF4 base learns four made-up commands, each of which replaces every word of a list by "
        "another one. Only q_proj and v_proj of the last three layers are adapted. LoRA has the smallest rank with at "
        "least the memory's trainable parameters."
    ),
    overrides=(
        "data.path=generated:word_codes",
        "adapter.target_modules=[q_proj, v_proj]",
        "adapter.layers_to_transform=[27, 28, 29]",
        "trainer.max_steps=400",
        "trainer.per_device_train_batch_size=16",
        "trainer.logging_steps=50",
        "evaluation.at_start=true",
        "evaluation.exact_match.enabled=false",
    ),
    variants=(
        Variant("lora", LORA, "LoRA", Match("adapter.r", "at_least", "queryable", largest=64)),
        Variant("queryable", QUERYABLE, "queryable memory"),
        *peft_methods(64, learning_rates=PEFT_RATES),
    ),
    default_variants=("lora", "queryable"),
    settings=(
        Setting("r2", ("adapter.r=2",), "Rank 2 of the memory."),
        Setting("r4", ("adapter.r=4",), "Rank 4 of the memory."),
        Setting("r16", ("adapter.r=16",), "Rank 16 of the memory."),
    ),
    default_settings=("r4",),
    seeds=tuple(range(13)),
    learning_rates=(8e-3, 1.6e-2, 2.4e-2, 4e-2, 6e-2),
    grid_settings=("r4",),
    grid_variants=("lora", "queryable"),
    grid_seeds=(0, 1, 2),
    metrics=(LOSS, ROW_ACCURACY),
)
