"""The quickstart's eight families, all layers adapted: a mixture that either adapter learns for the most part."""

from __future__ import annotations

import dataclasses

from qmemtune.study.baselines import peft_methods
from qmemtune.study.design import Setting, Variant
from qmemtune.study.studies import instructions

# As the recipe trains it: within 0.2 % of LoRA's parameters at every rank below.
QUERYABLE = ("adapter=queryable",)
OWN = ("lora", "queryable")

STUDY = dataclasses.replace(
    instructions.STUDY,
    name="quickstart",
    title="The quickstart's eight families",
    about=(
        "SmolLM2-135M on an NF4 base learns eight word-list tasks as the recipe `quickstart` trains them, 110 steps of "
        "16 rows, all linear layers adapted, with LoRA and with the queryable memory at equal parameters (within 0.2 "
        "%) and one learning rate."
    ),
    overrides=("evaluation.at_start=true",),
    variants=(
        Variant("lora", instructions.LORA, "LoRA"),
        Variant("queryable", QUERYABLE, "queryable memory"),
        *peft_methods(64),
    ),
    default_variants=OWN,
    settings=tuple(
        Setting(f"r{rank}", (f"adapter.r={rank}",), f"Rank {rank} on all linear layers.") for rank in (2, 4, 16)
    ),
    seeds=(0, 1, 2),
    # Up to 8e-3 at first, where the memory was best: two more, so that the grid has both sides of it.
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    grid_settings=("r4",),
    grid_variants=OWN,
    grid_seeds=(0, 1),
)
