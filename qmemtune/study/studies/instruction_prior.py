"""Word lists asked for in several wordings: what the instruction prior is good for."""

from __future__ import annotations

from qmemtune.study.design import EXACT_MATCH, LOSS, ROW_ACCURACY, Setting, Study, Variant

MEMORY = (
    "adapter=queryable",
    "adapter.num_atoms=32",
    "adapter.key_dim=16",
    "adapter.block_size=5",
    "adapter.memory_learning_rate_multiplier=5",
)
PRIOR = (*MEMORY, "adapter.instruction_prior=1")

VARIANTS = (
    Variant("no_prior", MEMORY, "no prior"),
    Variant("prior", PRIOR, "prior of weight 1"),
    Variant("sharp", (*PRIOR, "adapter.prior_temperature=0.2"), "prior of temperature 0.2"),
    Variant("kl", (*PRIOR, "adapter.prior_kl=0.1"), "prior of weight 1, and its divergence in the loss, weight 0.1"),
    Variant(
        "fading",
        (*PRIOR, "adapter.instruction_prior_final=0", "adapter.prior_schedule_share=0.5"),
        "prior that fades out over the first half",
    ),
    Variant(
        "annealed",
        (*PRIOR, "adapter.prior_temperature_final=0.2", "adapter.prior_schedule_share=0.5"),
        "prior whose temperature falls from 1 to 0.2 over the first half",
    ),
    Variant("lora", ("adapter=lora",), "LoRA"),
)

SETTINGS = (
    Setting(
        "few_rows",
        ("data.max_train_rows=96", "trainer.max_steps=60"),
        "Two rows of each wording, ten times over.",
    ),
    Setting("early", ("trainer.max_steps=40",), "The first 40 steps; no row comes twice."),
    Setting("all_rows", ("trainer.max_steps=300",), "All rows, 300 steps."),
)

STUDY = Study(
    name="instruction_prior",
    title="The instruction prior on wordings seen and unseen",
    about=(
        "SmolLM2-135M on an NF4 base learns eight word-list tasks in six wordings each, and is asked in three "
        "more; the queryable memory with and without the instruction prior (base embeddings). Groups are the wordings "
        "that occurred in training and those that did not."
    ),
    recipe="quickstart",
    overrides=(
        "data.path=generated:word_lists_paraphrased",
        "data.group_by=wording",
        "adapter.r=4",
        "adapter.target_modules=[q_proj, v_proj]",
        "optimizer.learning_rate=2e-3",
        "trainer.per_device_train_batch_size=16",
        "trainer.logging_steps=20",
    ),
    variants=VARIANTS,
    default_variants=("no_prior", "prior", "fading"),
    settings=SETTINGS,
    seeds=(0, 1, 2, 3, 4),
    metrics=(LOSS, ROW_ACCURACY, EXACT_MATCH),
)
