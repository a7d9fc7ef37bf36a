"""Options that were given and have no effect: each becomes a warning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qmemtune.config.adapters import QueryableConfig, uses_prior
from qmemtune.config.data import CONVERSATIONS
from qmemtune.config.fields import fields_of
from qmemtune.config.missing import MISSING
from qmemtune.config.paths import is_glob, looks_local
from qmemtune.config.regression import GENERATED_MLP, is_regression
from qmemtune.config.schema import Config
from qmemtune.config.splits import is_here


def unused_options(config: Config, given: Mapping[str, str]) -> list[str]:
    """One line for every given option that does nothing in this config.

    Args:
        config: a validated config.
        given: the keys to look at, and who set each.
    """
    groups = (_model, _data, _adapter, _training, _evaluation, _task)
    reasons = {key: reason for found in groups for key, reason in found(config).items()}
    lines = [f"{given[key]}: {key} has no effect: {reason}" for key, reason in reasons.items() if key in given]
    lines += [
        f"{given[key]}: {key} holds a backslash followed by n, not a line break -> in bash write $'...\\n...'"
        for key in ("data.prompt_template", "data.completion_template", "data.system")
        if key in given and "\\n" in (_text(config, key) or "")
    ]
    return lines


def _text(config: Config, key: str) -> str | None:
    section, name = key.split(".")
    value: str | None = getattr(getattr(config, section), name)
    return value


def _model(c: Config) -> dict[str, str]:
    reasons = {}
    local = looks_local(c.model.path) or c.model.path.startswith("package:")
    if local and c.model.revision is not None:
        reasons["model.revision"] = f"{c.model.path} is not on the hub"
    if c.quantization.kind in ("none", "int8"):
        for name in ("double_quant", "dequantized_copies"):
            reasons[f"quantization.{name}"] = f"quantization.kind is {c.quantization.kind}"
    return reasons


def _data(c: Config) -> dict[str, str]:
    reasons, data = _splits(c), c.data
    training = [] if data.sources else [data.path]
    if all(is_here(path) for path in [*training, data.eval_path] if path is not None):
        reasons["data.name"] = f"{data.path} is no hub data set" if training else "data.sources names the rows"
    for name, source in data.sources.items():
        if is_here(source.path):
            reasons[f"data.sources.{name}.name"] = f"{source.path} is no hub data set"
    if data.eval_path is not None:
        reasons["data.eval_fraction"] = "data.eval_path gives the held-out rows"
    elif data.eval_split is not None and "data.eval_split" not in reasons:
        reasons["data.eval_fraction"] = "data.eval_split gives the held-out rows"
    elif data.path.startswith("generated:"):
        reasons["data.eval_fraction"] = f"{data.path} brings its held-out rows"
    # It also says which rows stand for a part of a set.
    in_parts = any(source.weight % 1 or data.max_train_rows is not None for source in data.sources.values())
    if "data.eval_fraction" in reasons and not in_parts:
        reasons["data.split_seed"] = reasons["data.eval_fraction"]
    if data.format in CONVERSATIONS:
        for name in ("prompt_template", "completion_template"):
            reasons[f"data.{name}"] = f"{data.format} rows are rendered by the chat template"
    return reasons


def _splits(c: Config) -> dict[str, str]:
    reasons, data = {}, c.data
    heldout = data.path if data.eval_path is None else data.eval_path
    # Held-out rows of a path of their own are in data.split where data.eval_split is not set.
    uses_split = data.eval_path is not None and data.eval_split is None and not _has_no_splits(heldout)
    if not data.sources and _has_no_splits(data.path) and not uses_split:
        reasons["data.split"] = f"{data.path} has no splits"
    if data.sources and data.eval_path is None:
        reasons["data.eval_split"] = "data.sources names the rows"
    elif _has_no_splits(heldout):
        reasons["data.eval_split"] = f"{heldout} has no splits"
    for name, source in data.sources.items():
        if _has_no_splits(source.path):
            reasons[f"data.sources.{name}.split"] = f"{source.path} has no splits"
    return reasons


def _has_no_splits(path: str) -> bool:
    """Whether the rows at a data path are in no split, as those of files and generators; a folder may have some."""
    try:
        is_folder = Path(path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False
    return path != MISSING and not is_folder and (is_here(path) or is_glob(path))


def _task(c: Config) -> dict[str, str]:
    """Options of the other task: a regression's in a language model's run, and the reverse."""
    if not is_regression(c):
        keys = [key for key in fields_of(c.adapter.kind) if key.startswith(("model.mlp.", "data.regression."))]
        return dict.fromkeys(keys, f"model.path is not {GENERATED_MLP}")
    kept = ("data.path", "data.regression.")
    keys = [key for key in fields_of(c.adapter.kind) if key.startswith("data.") and not key.startswith(kept)]
    reasons = dict.fromkeys(keys, "the rows of a regression are generated")
    for name in ("tokenizer", "chat_template", "attn_implementation", "trust_remote_code"):
        reasons[f"model.{name}"] = "the base of a regression is trained here"
    reasons["trainer.compile"] = "the network of a regression is too small to gain by it"
    for name in ("packing", "padding_free", "length_grouping"):
        reasons[f"trainer.{name}"] = "the rows of a regression are of one length"
    return reasons


def _adapter(c: Config) -> dict[str, str]:
    reasons = {}
    if isinstance(c.adapter, QueryableConfig):
        finals = ("instruction_prior_final", "prior_temperature_final", "prior_kl_final")
        if all(getattr(c.adapter, name) is None for name in finals):
            reasons["adapter.prior_schedule_share"] = "no final value of the prior is set"
        if not uses_prior(c.adapter):
            for name in ("prior_encoder", "prior_temperature", "prior_kl", *finals[1:], "prior_schedule_share"):
                reasons[f"adapter.{name}"] = "adapter.instruction_prior is 0"
        elif c.data.instruction == "none":
            reasons["adapter.instruction_prior"] = "data.instruction is none, so no row has an instruction"
    return reasons


def _training(c: Config) -> dict[str, str]:
    reasons = {}
    if c.trainer.compile and c.trainer.fused_layers:
        reasons["trainer.fused_layers"] = "trainer.compile takes their place"
    if c.trainer.packing:
        reasons["trainer.length_grouping"] = "trainer.packing is on"
    if not c.trainer.gradient_checkpointing:
        reasons["trainer.gradient_checkpointing_use_reentrant"] = "trainer.gradient_checkpointing is off"
    if not isinstance(c.adapter, QueryableConfig):
        reasons["trainer.route_stats_steps"] = f"a {c.adapter.kind} adapter has no routes"
    if c.trainer.max_steps is not None:
        reasons["trainer.num_train_epochs"] = f"trainer.max_steps = {c.trainer.max_steps} ends the run"
    if c.optimizer.name in ("adafactor", "sgd"):
        reasons["optimizer.betas"] = f"{c.optimizer.name} has none"
        reasons["optimizer.eps"] = f"{c.optimizer.name} takes no such value"
    if c.optimizer.schedule == "constant":
        reasons["optimizer.warmup_steps"] = "optimizer.schedule is constant: take constant_with_warmup"
    if not c.tracking.backends:
        reasons["tracking.project"] = reasons["tracking.name"] = "tracking.backends is empty"
    return reasons


def _evaluation(c: Config) -> dict[str, str]:
    reasons = {}
    if not c.evaluation.exact_match.enabled:
        for key in fields_of(c.adapter.kind):
            if key.startswith("evaluation.exact_match.") and not key.endswith(".enabled"):
                reasons[key] = "evaluation.exact_match.enabled is false"
    if c.evaluation.samples.every_steps is None:
        for name in ("count", "max_new_tokens"):
            reasons[f"evaluation.samples.{name}"] = "evaluation.samples.every_steps is not set"
    if not c.evaluation.tasks:
        reasons["evaluation.tasks_limit"] = "evaluation.tasks is empty"
    return reasons | _export(c)


def _export(c: Config) -> dict[str, str]:
    reasons, export = {}, c.export
    quantised = c.quantization.kind != "none"
    folded = isinstance(c.adapter, QueryableConfig) and not export.is_live
    if export.format != "merged":
        reasons["export.dtype"] = reasons["export.base"] = f"export.format is {export.format}"
        reasons["export.gguf"] = f"export.format is {export.format}"
    elif not quantised:
        reasons["export.base"] = "quantization.kind is none"
    if not (folded or (export.format == "merged" and quantised and export.base == "auto" and export.fidelity)):
        reasons["export.calibration_rows"] = reasons["export.calibration"] = "nothing is folded"
    for name in ("rank", "distill_steps", "distill_learning_rate", "distill_rows"):
        if not folded or export.fold != "distill":
            reasons[f"export.{name}"] = "nothing is distilled"
    if not folded:
        reasons["export.fold"] = "nothing is folded"
    if export.push_to_hub is None:
        reasons["export.push_public"] = "export.push_to_hub is not set"
    if not export.fidelity:
        distills = folded and export.fold == "distill"
        for name in ("fidelity_rows", "max_loss_increase", *(() if distills else ("max_kl",))):
            reasons[f"export.{name}"] = "export.fidelity is false"
    return reasons
