"""Word lists under made-up commands: a mixture of instructions that pull in different directions."""

from __future__ import annotations

from qmemtune.study.baselines import peft_methods
from qmemtune.study.design import EXACT_MATCH, LOSS, ROW_ACCURACY, Setting, Study, Variant

QUERYABLE = (
    "adapter=queryable",
    "adapter.num_atoms=32",
    "adapter.key_dim=16",
    "adapter.block_size=5",
    "adapter.memory_learning_rate_multiplier=2",
    "adapter.temperature=3",
)
LORA = ("adapter=lora",)
VARIANTS = (
    Variant("lora", LORA, "LoRA"),
    Variant("lora_larger", LORA, "LoRA of one rank more"),
    Variant("queryable", QUERYABLE, "queryable memory"),
    *peft_methods(64),
)
RANKS = {2: (), 4: (), 16: ("adapter.num_atoms=24",)}
"""Rank -> what keeps the memory within one percent of LoRA's parameters there."""


def settings() -> tuple[Setting, ...]:
    """One for each rank."""
    return tuple(
        Setting(
            f"r{rank}",
            (f"adapter.r={rank}",),
            f"Rank {rank} on q_proj and v_proj.",
            {"lora_larger": (f"adapter.r={rank + 1}",), "queryable": extra},
        )
        for rank, extra in RANKS.items()
    )


STUDY = Study(
    name="instructions",
    title="Twelve made-up commands on word lists",
    about=(
        "SmolLM2-135M on an NF4 base learns twelve made-up commands on lists of four words, with LoRA and with the "
        "queryable memory at equal parameters (within 1 %) and equal steps."
    ),
    recipe="quickstart",
    overrides=(
        "data.path=generated:word_lists_hard",
        "adapter.target_modules=[q_proj, v_proj]",
        # LoRA's best on seed 0: 4e-3 and 1.2e-2 were worse. The memory was tried at 8e-3 only.
        "optimizer.learning_rate=8e-3",
        "trainer.max_steps=300",
        "trainer.per_device_train_batch_size=16",
        "trainer.logging_steps=50",
        "evaluation.at_start=true",
    ),
    variants=VARIANTS,
    default_variants=("lora", "lora_larger", "queryable"),
    settings=settings(),
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    grid_settings=("r4",),
    grid_variants=("lora", "queryable"),
    metrics=(LOSS, ROW_ACCURACY, EXACT_MATCH),
)
