"""Noisy regression: a base is adapted from one function to another whose change depends on the input."""

from __future__ import annotations

from qmemtune.study.baselines import peft_methods
from qmemtune.study.design import Match, Setting, Study, Variant

LORA = ("adapter=lora",)
QUERYABLE = (
    "adapter=queryable",
    "adapter.num_atoms=9",
    "adapter.key_dim=16",
    "adapter.block_size=1",
    "adapter.memory_learning_rate_multiplier=2",
)
VARIANTS = (
    Variant(
        "lora",
        LORA,
        "LoRA of the smallest rank that has at least the memory's parameters",
        Match("adapter.r", "at_least", "queryable", largest=64),
    ),
    Variant("queryable", QUERYABLE, "queryable memory"),
    *peft_methods(8, match_dora=True, largest_rank=64, learning_rates={"vera": 0.1, "vblora": 0.1}),
)

STUDY = Study(
    name="regression",
    title="Noisy regression",
    about=(
        "A small network, trained on one function, is adapted to another whose change depends on the input. "
        "LoRA has at least the memory's trainable parameters, PEFT's other methods at most LoRA's. The loss is the "
        "mean squared error on held-out rows without noise; every seed is a problem of its own, with its own "
        "functions, base, rows and noise."
    ),
    recipe="regression_noisy",
    # Each variant's best in each setting on seeds 0-2, where none of its own is given.
    overrides=(
        "adapter.r=4",
        "optimizer.learning_rate=3e-2",
        "evaluation.at_start=true",
        "trainer.logging_steps=500",
    ),
    variants=VARIANTS,
    default_variants=("lora", "queryable"),
    settings=(
        Setting(
            "ample",
            ("data.regression.rows=20000", "data.regression.noise_std=0.3"),
            "20,000 rows, noise of standard deviation 0.3.",
        ),
        Setting(
            "little",
            ("data.regression.rows=2048", "data.regression.noise_std=0.5", "trainer.max_steps=400"),
            "2,048 rows, noise of standard deviation 0.5; the memory's cores decay by 1.0.",
            {
                "queryable": ("adapter.core_weight_decay=1.0",),
                "vera": ("optimizer.learning_rate=3e-2",),
                "lily": ("optimizer.learning_rate=0.1",),
            },
        ),
    ),
    seeds=tuple(range(13)),
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    grid_seeds=(0, 1, 2),
)
