"""Checks across fields: combinations that cannot work, each a small function that yields (key, problem, way out)."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.missing import MISSING
from qmemtune.config.schema import Config

DATA_PATHS = ("data.path", "data.eval_path")
Problem = tuple[str, str, str | None]
Check = Callable[[Config], Iterator[Problem]]
CHECKS: list[Check] = []

GENERATED_MLP = "generated:mlp"
NOISY_REGRESSION = "generated:noisy_regression"
BOTH = "use recipe=regression_noisy, or model=mlp data=regression together"


def check(function: Check) -> Check:
    """Add a check."""
    CHECKS.append(function)
    return function


def cross_field_problems(config: Config) -> list[Problem]:
    """What every check finds: the key whose source a message should name, the problem, the way out."""
    return [problem for function in CHECKS for problem in function(config)]


def _value(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


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


@check
def ranges(c: Config) -> Iterator[Problem]:
    queryable = isinstance(c.adapter, QueryableConfig)
    for keys, holds, words in (
        (AT_LEAST_ONE + (AT_LEAST_ONE_QUERYABLE if queryable else ()), lambda v: v >= 1, "must be at least 1"),
        (ABOVE_ZERO + (ABOVE_ZERO_QUERYABLE if queryable else ()), lambda v: v > 0, "must be above 0"),
        (NOT_NEGATIVE + (NOT_NEGATIVE_QUERYABLE if queryable else ()), lambda v: v >= 0, "must not be negative"),
    ):
        for key in keys:
            value = _value(c, key)
            if value is not None and not holds(value):
                yield key, f"{words}, not {value}", None


@check
def shares(c: Config) -> Iterator[Problem]:
    if not 0 <= c.adapter.dropout < 1:
        yield "adapter.dropout", f"must be in [0, 1), not {c.adapter.dropout}", None
    if not 0 <= c.data.eval_fraction < 1:
        yield "data.eval_fraction", f"must be in [0, 1), not {c.data.eval_fraction}", None
    if c.optimizer.warmup_steps > 1 and c.optimizer.warmup_steps != int(c.optimizer.warmup_steps):
        yield "optimizer.warmup_steps", "above 1 it counts steps and must be whole", "give a share below 1 or a count"
    if c.seed >= 2**32 or c.data.split_seed >= 2**32:
        yield "seed" if c.seed >= 2**32 else "data.split_seed", "must be below 2**32", None


@check
def prior_schedule(c: Config) -> Iterator[Problem]:
    if isinstance(c.adapter, QueryableConfig) and c.adapter.prior_schedule_share > 1:
        yield "adapter.prior_schedule_share", f"must be at most 1, not {c.adapter.prior_schedule_share}", None


@check
def betas(c: Config) -> Iterator[Problem]:
    if len(c.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in c.optimizer.betas):
        yield "optimizer.betas", f"must be two numbers in [0, 1), not {c.optimizer.betas}", "write [0.9, 0.999]"


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
    if c.adapter.init == "pissa" and c.quantization.kind != "none":
        yield "adapter.init", "pissa decomposes full-precision weights", "set quantization=none, or adapter.init=olora"
    if c.adapter.init == "orthogonal" and c.adapter.r % 2:
        yield "adapter.init", f"orthogonal needs an even rank, not {c.adapter.r}", f"set adapter.r={c.adapter.r + 1}"


@check
def reentrant(c: Config) -> Iterator[Problem]:
    key = "trainer.gradient_checkpointing_use_reentrant"
    if c.trainer.gradient_checkpointing_use_reentrant and isinstance(c.adapter, QueryableConfig):
        yield key, "the queryable memory gets wrong gradients from reentrant checkpointing", f"set {key}=false"


@check
def packing(c: Config) -> Iterator[Problem]:
    if not c.trainer.packing or not isinstance(c.adapter, QueryableConfig):
        return
    if c.adapter.granularity == "row":
        yield "trainer.packing", "a route of a whole row would mix packed rows", "set adapter.granularity=token"


@check
def warmup(c: Config) -> Iterator[Problem]:
    steps = c.trainer.max_steps
    if steps is not None and c.optimizer.warmup_steps >= max(steps, 1) and c.optimizer.warmup_steps >= 1:
        yield (
            "optimizer.warmup_steps",
            f"the warm-up of {c.optimizer.warmup_steps:g} steps does not end within {steps} steps",
            "lower it, or give a share below 1",
        )


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
        if _value(c, key) is not None:
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
    keys = {key: _value(c, key) for key in ("data.remove_pattern", "evaluation.exact_match.answer_pattern")}
    keys |= {f"data.sources.{name}.remove_pattern": source.remove_pattern for name, source in c.data.sources.items()}
    for key, pattern in keys.items():
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield key, f"not a regular expression: {error}", None


@check
def paths(c: Config) -> Iterator[Problem]:
    keys = {key: _value(c, key) for key in ("model.path", "model.tokenizer", "model.chat_template", *DATA_PATHS)}
    keys |= {f"data.sources.{name}.path": source.path for name, source in c.data.sources.items()}
    for key, path in keys.items():
        if isinstance(path, str) and path != MISSING and looks_local(path, is_file=key == "model.chat_template"):
            yield from _exists(key, path)
        elif path == "":
            yield key, "is empty", None
    if isinstance(c.adapter, QueryableConfig) and c.adapter.prior_encoder != "base" and uses_prior(c.adapter):
        yield from _exists("adapter.prior_encoder", c.adapter.prior_encoder)
    resume = c.resume.path
    if resume is not None and resume != "auto":
        yield from _exists("resume.path", resume)
    if resume == "auto" and c.run_dir is None:
        yield "resume.path", "auto needs to know the run folder", "give run_dir=, or resume=<path of a checkpoint>"


def _exists(key: str, path: str) -> Iterator[Problem]:
    try:
        file = Path(path).expanduser()
        there = file.exists() or (is_glob(path) and any(True for _ in glob.iglob(str(file), recursive=True)))
    except (OSError, ValueError):
        there = False
    if not there:
        yield key, f"{path} does not exist (seen from {Path.cwd()})", f"check the path, or give another with {key}="


def looks_local(path: str, *, is_file: bool = False) -> bool:
    """Whether a path can only mean a file or folder here, not a hub id or a package's file."""
    if path.startswith(("package:", "generated:")):
        return False
    ends = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".gguf", ".jinja")
    return is_file or path.startswith((".", "/", "~")) or path.lower().endswith((*ends, ".safetensors"))


def is_glob(path: str) -> bool:
    """Whether a path is a pattern for several files."""
    return "*" in path or "?" in path


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


def uses_prior(adapter: QueryableConfig) -> bool:
    """Whether instructions have an effect at any point of the run."""
    return bool(adapter.instruction_prior or adapter.instruction_prior_final)


@check
def regression(c: Config) -> Iterator[Problem]:
    model, data = c.model.path == GENERATED_MLP, c.data.path == NOISY_REGRESSION
    if model and not data and c.data.path != MISSING:
        yield "data.path", f"{GENERATED_MLP} is the base of a regression, and {c.data.path} holds text", BOTH
    if data and not model and c.model.path != MISSING:
        yield "model.path", f"{NOISY_REGRESSION} is a regression, and {c.model.path} a language model", BOTH
    if model and c.quantization.kind != "none":
        yield "quantization.kind", f"{GENERATED_MLP} has no quantised form", "set quantization=none"
    if model and c.evaluation.exact_match.enabled:
        yield "evaluation.exact_match.enabled", "a regression generates no answers", "set it to false"
    if model and c.trainer.gradient_checkpointing:
        yield "trainer.gradient_checkpointing", f"{GENERATED_MLP} has no such mode", "set it to false"


def is_regression(c: Config) -> bool:
    """Whether the run is a regression on generated rows and not a language model's."""
    return c.model.path == GENERATED_MLP


def has_heldout(c: Config) -> bool:
    """Whether the data settings can give held-out rows (generated data brings its own)."""
    return (
        c.data.eval_path is not None
        or c.data.eval_split is not None
        or c.data.eval_fraction > 0
        or any(path.startswith("generated:") for path in (c.data.path, *(s.path for s in c.data.sources.values())))
    )
