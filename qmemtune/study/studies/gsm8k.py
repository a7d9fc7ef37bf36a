"""School problems worked out step by step: held-out loss."""

from __future__ import annotations

import dataclasses

from qmemtune.study.design import LOSS
from qmemtune.study.studies import instructions

STUDY = dataclasses.replace(
    instructions.STUDY,
    name="gsm8k",
    title="GSM8K",
    about=(
        "SmolLM2-135M on an NF4 base learns GSM8K's worked answers, with LoRA and with the queryable memory at equal "
        "parameters (within 1 %) and equal steps."
    ),
    recipe="smollm2_gsm8k",
    overrides=(
        "data.max_length=256",
        "adapter.target_modules=[q_proj, v_proj]",
        "optimizer.learning_rate=1e-3",
        "trainer.max_steps=150",
        "trainer.logging_steps=50",
        "evaluation.at_start=true",
    ),
    seeds=(0, 1, 2),
    metrics=(LOSS,),
)
