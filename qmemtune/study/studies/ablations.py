"""What each part of the queryable memory contributes, on the regression or on a language study."""

from __future__ import annotations

import dataclasses

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.study import StudyConfig
from qmemtune.study.design import Match, Study, Variant
from qmemtune.study.studies import codes, instructions, quickstart, regression

BASES = {"regression": regression, "instructions": instructions, "codes": codes, "quickstart": quickstart}
BLOCKS = {"instructions": 6, "quickstart": 6}
"""Blocks of a base study whose number of atoms they cannot share evenly: SmolLM2's thirty layers in fives."""
CHANGES = (
    ("no_depth_summary", "without the depth summary", ("adapter.depth_summary=false",)),
    ("top_2", "the two strongest atoms of each route only", ("adapter.top_k=2",)),
    ("no_router_norm", "queries and keys not normalised", ("adapter.router_norm=false",)),
    ("no_centering", "cores with their mean", ("adapter.center_cores=false",)),
    ("no_query_centering", "queries with what all inputs have in common", ("adapter.center_queries=false",)),
    (
        "one_atom",
        "a single atom: one static core for all layers and tokens",
        ("adapter.num_atoms=1", "adapter.center_cores=false"),
    ),
    ("fewer_atoms", "a quarter of the atoms", ("adapter.num_atoms={quarter}",)),
    ("more_atoms", "four times the atoms", ("adapter.num_atoms={fourfold}",)),
    ("one_block", "one route for all layers", ("adapter.block_size=1000",)),
    ("larger_blocks", "blocks of twice the layers", ("adapter.block_size={double_block}",)),
    ("decay", "cores with decay 1.0", ("adapter.core_weight_decay=1",)),
    ("same_learning_rate", "memory at the factors' learning rate", ("adapter.memory_learning_rate_multiplier=1",)),
    (
        "block_atoms",
        "atoms of each block in place of shared ones: {block_atoms} in all",
        ("adapter.shared_atoms=false", "adapter.num_atoms={block_atoms}"),
    ),
    ("generated_core", "a generated core: a small network in place of the routes", ("adapter.generated_core=true",)),
)
LANGUAGE = (
    ("prior", "with the instruction prior", ("adapter.instruction_prior=1",)),
    (
        "row_routes",
        "one route a row, formed from its prompt (loss only)",
        ("adapter.granularity=row", "evaluation.exact_match.enabled=false"),
    ),
)
"""Only where rows are text."""


def study(options: StudyConfig) -> Study:
    """The ablations on the task that ``study.on`` names."""
    base = BASES[options.on]
    of_base = {variant.name: variant for variant in base.STUDY.variants}
    memory = of_base["queryable"]
    given = dict(text.split("=", 1) for text in memory.overrides)
    atoms = int(given.get("adapter.num_atoms", QueryableConfig.num_atoms))
    block = int(given.get("adapter.block_size", QueryableConfig.block_size))
    blocks = BLOCKS.get(options.on, 1)
    numbers = {
        "quarter": max(atoms // 4, 1),
        "fourfold": 4 * atoms,
        "double_block": 2 * block,
        "block_atoms": -(-atoms // blocks) * blocks,
    }
    changes = CHANGES + (() if options.on == "regression" else LANGUAGE)
    variants = [memory]
    for name, about, changed in changes:
        new = tuple(text.format(**numbers) for text in changed)
        if not set(new) <= set(memory.overrides):
            variants.append(Variant(name, (*memory.overrides, *new), about.format(**numbers), like=memory.name))
    largest = Match("adapter.r", "at_least", memory.name, largest=64)
    about = "LoRA of the smallest rank that has at least as many"
    variants.append(Variant("lora", of_base["lora"].overrides, about, largest))
    return dataclasses.replace(
        base.STUDY,
        name="ablations",
        title=f"Ablations ({options.on})",
        about=f"The queryable memory of the study `{options.on}`, one thing changed at a time.",
        variants=tuple(variants),
        default_variants=(),
        default_settings=("ample",) if options.on == "regression" else ("r4",),
        seeds=(3, 4, 5, 6, 7) if options.on == "regression" else (3, 4, 5),
        learning_rates=(),
        on=None if options.on == StudyConfig.on else options.on,
    )
