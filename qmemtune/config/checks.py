"""Checks across fields: combinations that cannot work, each a small function that yields (key, problem, way out)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qmemtune.config.adapters import INITS_FROM_WEIGHTS, LoraConfig, QueryableConfig
from qmemtune.config.limits import betas, prior_schedule, ranges, shares
from qmemtune.config.missing import MISSING
from qmemtune.config.paths import paths
from qmemtune.config.problem import Check, Problem, value_of
from qmemtune.config.regression import regression
from qmemtune.config.schema import Config

CHECKS: list[Check] = [ranges, shares, prior_schedule, betas]
"""In the order in which a message names what they find."""


def check(function: Check) -> Check:
    """Add a check."""
    CHECKS.append(function)
    return function


def cross_field_problems(config: Config) -> list[Problem]:
    """What every check finds: the key whose source a message should name, the problem, the way out."""
    return [problem for function in CHECKS for problem in function(config)]


@check
def top_k(c: Config) -> Iterator[Problem]:
    if isinstance(c.adapter, QueryableConfig) and (c.adapter.top_k or 0) > c.adapter.num_atoms:
        yield (
            "adapter.top_k",
            f"top_k = {c.adapter.top_k} is more than num_atoms = {c.adapter.num_atoms}",
            f"lower adapter.top_k to {c.adapter.num_atoms} or raise adapter.num_atoms",
        )


@check
def targets(c: Config) -> Iterator[Problem]:
    if not c.adapter.target_modules or any(not name.strip() for name in c.adapter.target_modules):
        yield "adapter.target_modules", "names no layer", "write [q_proj, v_proj] or all-linear"
    elif "all-linear" in c.adapter.target_modules and len(c.adapter.target_modules) > 1:
        yield "adapter.target_modules", "all-linear stands beside other names", "give all-linear alone"
    if c.adapter.layers_to_transform is not None:
        layers = c.adapter.layers_to_transform
        if not layers or min(layers) < 0:
            yield "adapter.layers_to_transform", f"must hold indices from 0, not {layers}", None


@check
def lora_init(c: Config) -> Iterator[Problem]:
    if not isinstance(c.adapter, LoraConfig):
        return
    if c.adapter.init in INITS_FROM_WEIGHTS and c.quantization.kind != "none":
        problem = f"{c.adapter.init} decomposes full-precision weights"
        yield "adapter.init", problem, "set quantization=none, or adapter.init=default"
    if c.adapter.init == "orthogonal" and c.adapter.r % 2:
        yield "adapter.init", f"orthogonal needs an even rank, not {c.adapter.r}", f"set adapter.r={c.adapter.r + 1}"


@check
def reentrant(c: Config) -> Iterator[Problem]:
    key = "trainer.gradient_checkpointing_use_reentrant"
    if c.trainer.gradient_checkpointing_use_reentrant and isinstance(c.adapter, QueryableConfig):
        yield key, "the queryable memory gets wrong gradients from reentrant checkpointing", f"set {key}=false"
    if c.trainer.gradient_checkpointing_use_reentrant and c.trainer.padding_free:
        yield key, "reentrant checkpointing loses which row of a sequence a token is of", f"set {key}=false"


@check
def compiled_recomputation(c: Config) -> Iterator[Problem]:
    if c.trainer.compile and c.trainer.gradient_checkpointing and isinstance(c.adapter, QueryableConfig):
        yield (
            "trainer.compile",
            "routes pass from layer to layer, which torch.compile does not follow into recomputed layers",
            "set trainer.compile=false or trainer.gradient_checkpointing=false",
        )


@check
def rows_in_one_sequence(c: Config) -> Iterator[Problem]:
    if not isinstance(c.adapter, QueryableConfig) or c.adapter.granularity == "token":
        return
    for name in ("packing", "padding_free"):
        if getattr(c.trainer, name):
            reason = "a route of a whole row would mix the rows of a sequence"
            yield f"trainer.{name}", reason, "set adapter.granularity=token"


@check
def routes_of_rows(c: Config) -> Iterator[Problem]:
    if not isinstance(c.adapter, QueryableConfig) or c.adapter.granularity == "token":
        return
    for key, generates, off in (
        ("evaluation.exact_match.enabled", c.evaluation.exact_match.enabled, "false"),
        ("evaluation.samples.every_steps", c.evaluation.samples.every_steps is not None, "null"),
        ("evaluation.tasks", bool(c.evaluation.tasks), "[]"),
    ):
        if generates:
            yield key, "routes of whole rows (adapter.granularity=row) are for losses only", f"set {key}={off}"


def endless_warmup(c: Config, steps: int) -> Iterator[Problem]:
    """A warm-up after which none of the run's steps is left: the learning rate would never be reached."""
    given = c.optimizer.warmup_steps
    if given >= max(steps, 1) and c.optimizer.schedule != "constant":
        yield (
            "optimizer.warmup_steps",
            f"the warm-up of {given:g} steps does not end within the run's {steps} steps",
            "lower it, or give a share below 1",
        )


@check
def warmup(c: Config) -> Iterator[Problem]:
    if c.trainer.max_steps is not None:
        yield from endless_warmup(c, c.trainer.max_steps)


@check
def needs_evaluation(c: Config) -> Iterator[Problem]:
    for key, given in (
        ("trainer.early_stopping_patience", c.trainer.early_stopping_patience is not None),
        ("trainer.keep_best", c.trainer.keep_best),
    ):
        if given and c.evaluation.every_steps is None:
            yield key, "needs evaluations during training", "set evaluation.every_steps"
        if given and not has_heldout(c):
            yield key, "needs held-out rows, and none are held out", "set data.eval_path or data.eval_fraction"


@check
def needs_heldout(c: Config) -> Iterator[Problem]:
    if has_heldout(c):
        return
    if c.evaluation.at_start:
        yield "evaluation.at_start", "needs held-out rows, and none are held out", "set data.eval_path"
    for key in ("evaluation.every_steps", "evaluation.exact_match.every_steps", "evaluation.samples.every_steps"):
        if value_of(c, key) is not None:
            yield key, "needs held-out rows, and none are held out", "set data.eval_path or data.eval_fraction"


@check
def best_checkpoint_is_saved(c: Config) -> Iterator[Problem]:
    save, every = c.trainer.save_steps, c.evaluation.every_steps
    if c.trainer.keep_best and save and every and save % every:
        yield (
            "trainer.save_steps",
            f"saves every {save} steps do not fall on evaluations every {every} steps, so the best one may be lost",
            f"make trainer.save_steps a multiple of {every}, or leave it out",
        )


@check
def patterns(c: Config) -> Iterator[Problem]:
    keys = {key: value_of(c, key) for key in ("data.remove_pattern", "evaluation.exact_match.answer_pattern")}
    keys |= {f"data.sources.{name}.remove_pattern": source.remove_pattern for name, source in c.data.sources.items()}
    for key, pattern in keys.items():
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield key, f"not a regular expression: {error}", None


check(paths)


@check
def data_sources(c: Config) -> Iterator[Problem]:
    if c.data.sources and c.data.path != MISSING:
        yield "data.path", "data.path and data.sources both name training rows", "leave one of them out (~data.path)"
    for name, source in c.data.sources.items():
        if not source.weight > 0:
            yield f"data.sources.{name}.weight", f"must be above 0, not {source.weight}", "leave the source out"


@check
def data_name(c: Config) -> Iterator[Problem]:
    if c.data.path.startswith("package:"):
        yield "data.path", "package: names model files, not data", "give a file, a hub id or generated:NAME"


@check
def half_precision_on_cpu(c: Config) -> Iterator[Problem]:
    # torch is not imported here; a machine without NVIDIA's device file has no CUDA device.
    if c.model.compute_dtype == "float16" and not _has_accelerator():
        yield "model.compute_dtype", "float16 does not train on a CPU", "leave it at auto, or take float32"


def _has_accelerator() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


@check
def names(c: Config) -> Iterator[Problem]:
    if not re.match(r"^[^/\\\0]+$", c.recipe) or c.recipe in (".", ".."):
        yield "recipe", f"{c.recipe!r} cannot name a folder", "use a plain name"
    if c.run_dir == "":
        yield "run_dir", "is empty", "give a folder, or leave it out"


check(regression)


def has_heldout(c: Config) -> bool:
    """Whether the data settings can give held-out rows (generated data brings its own)."""
    return (
        c.data.eval_path is not None
        or c.data.eval_split is not None
        or c.data.eval_fraction > 0
        or any(path.startswith("generated:") for path in (c.data.path, *(s.path for s in c.data.sources.values())))
    )
