"""Limits of single numbers."""

from __future__ import annotations

from collections.abc import Iterator

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.problem import Problem, value_of
from qmemtune.config.schema import Config

AT_LEAST_ONE = (
    "adapter.r",
    "data.max_length",
    "data.max_train_rows",
    "data.max_eval_rows",
    "trainer.max_steps",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.logging_steps",
    "trainer.route_stats_steps",
    "trainer.max_bad_steps",
    "trainer.save_steps",
    "trainer.save_total_limit",
    "trainer.early_stopping_patience",
    "evaluation.every_steps",
    "evaluation.per_device_eval_batch_size",
    "evaluation.max_rows",
    "evaluation.exact_match.every_steps",
    "evaluation.exact_match.max_new_tokens",
    "evaluation.exact_match.max_rows",
    "evaluation.samples.every_steps",
    "evaluation.samples.count",
    "evaluation.samples.max_new_tokens",
    "evaluation.tasks_limit",
    "model.mlp.width",
    "model.mlp.depth",
    "data.regression.rows",
    "data.regression.heldout_rows",
    "data.regression.inputs",
    "data.regression.outputs",
    "data.regression.regions",
    "data.regression.correction_rank",
    "export.calibration_rows",
    "export.rank",
    "export.distill_steps",
    "export.distill_rows",
    "export.fidelity_rows",
)
AT_LEAST_ONE_QUERYABLE = ("adapter.num_atoms", "adapter.key_dim", "adapter.block_size", "adapter.top_k")
ABOVE_ZERO = (
    "export.distill_learning_rate",
    "optimizer.learning_rate",
    "optimizer.eps",
    "trainer.num_train_epochs",
    "adapter.alpha",
)
ABOVE_ZERO_QUERYABLE = (
    "adapter.temperature",
    "adapter.memory_learning_rate_multiplier",
    "adapter.prior_temperature",
    "adapter.prior_temperature_final",
    "adapter.prior_schedule_share",
)
NOT_NEGATIVE = (
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "trainer.max_grad_norm",
    "trainer.num_workers",
    "data.max_rejected",
    "seed",
    "data.split_seed",
    "model.mlp.pretrain_steps",
    "data.regression.noise_std",
    "data.regression.correction_std",
    "data.regression.sharpness",
    "data.regression.seed",
    "export.max_kl",
)
NOT_NEGATIVE_QUERYABLE = (
    "adapter.init_core_std",
    "adapter.core_weight_decay",
    "adapter.instruction_prior",
    "adapter.prior_kl",
    "adapter.instruction_prior_final",
    "adapter.prior_kl_final",
)


def ranges(c: Config) -> Iterator[Problem]:
    """Numbers that are too small."""
    queryable = isinstance(c.adapter, QueryableConfig)
    for keys, holds, words in (
        (AT_LEAST_ONE + (AT_LEAST_ONE_QUERYABLE if queryable else ()), lambda v: v >= 1, "must be at least 1"),
        (ABOVE_ZERO + (ABOVE_ZERO_QUERYABLE if queryable else ()), lambda v: v > 0, "must be above 0"),
        (NOT_NEGATIVE + (NOT_NEGATIVE_QUERYABLE if queryable else ()), lambda v: v >= 0, "must not be negative"),
    ):
        for key in keys:
            value = value_of(c, key)
            if value is not None and not holds(value):
                yield key, f"{words}, not {value}", None


def shares(c: Config) -> Iterator[Problem]:
    """Shares that are none, and seeds that no generator takes."""
    if not 0 <= c.adapter.dropout < 1:
        yield "adapter.dropout", f"must be in [0, 1), not {c.adapter.dropout}", None
    if not 0 <= c.data.eval_fraction < 1:
        yield "data.eval_fraction", f"must be in [0, 1), not {c.data.eval_fraction}", None
    if c.optimizer.warmup_steps > 1 and c.optimizer.warmup_steps != int(c.optimizer.warmup_steps):
        yield "optimizer.warmup_steps", "above 1 it counts steps and must be whole", "give a share below 1 or a count"
    if c.seed >= 2**32 or c.data.split_seed >= 2**32:
        yield "seed" if c.seed >= 2**32 else "data.split_seed", "must be below 2**32", None


def prior_schedule(c: Config) -> Iterator[Problem]:
    """A schedule of the prior that is longer than the run."""
    if isinstance(c.adapter, QueryableConfig) and c.adapter.prior_schedule_share > 1:
        yield "adapter.prior_schedule_share", f"must be at most 1, not {c.adapter.prior_schedule_share}", None


def betas(c: Config) -> Iterator[Problem]:
    """Moment decays that are not two, or do not decay."""
    if len(c.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in c.optimizer.betas):
        yield "optimizer.betas", f"must be two numbers in [0, 1), not {c.optimizer.betas}", "write [0.9, 0.999]"
