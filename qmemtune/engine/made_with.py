"""What a checkpoint was made with (config, base, rows, versions, machine), and what is another since."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.dump import to_dict
from qmemtune.config.schema import Config
from qmemtune.config.settings import flatten
from qmemtune.data.changes import all_files, state_of
from qmemtune.data.fingerprint import rows_digest
from qmemtune.engine.checkpoints import found_checkpoints
from qmemtune.engine.environment import PACKAGES, processor_name, version_of
from qmemtune.engine.manifest import Checkpoint
from qmemtune.engine.steps import StepCount
from qmemtune.errors import Finding, UserError
from qmemtune.models.fingerprint import base_digests
from qmemtune.rundir import RunDir, read_json

FILE = "made_with.json"
NOT_KEPT = ("run_dir", "resume.")
"""Keys that say where and how, not what."""
HARMLESS = (
    "description", "needs", "recipe", "export.", "tracking.", "evaluation.", "model.trust_remote_code",
    "quantization.dequantized_copies", "trainer.logging_steps", "trainer.route_stats_steps", "trainer.save_steps",
    "trainer.save_total_limit", "trainer.num_workers", "trainer.max_bad_steps", "trainer.profile",
    "trainer.early_stopping_patience",
)  # fmt: skip
"""Keys, or starts of them, that change no step; they may change what is logged, measured and kept from here on."""
LENGTHS = ("trainer.max_steps", "trainer.num_train_epochs")
"""Keys that say how long a run is."""
DECIDING = ("evaluation.every_steps", "evaluation.max_rows")
"""Keys that decide what a run ends with, where it keeps the best adapter or stops early."""
COMPUTE = ("qmemtune", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Packages whose other versions may compute other numbers."""


BATCHES = ("trainer.padding_free", "trainer.length_grouping")
"""Keys that are found out where they are not set; compared by what they came to."""
MACHINE = {"device": "the device", "processor": "the processor", "threads": "the number of threads"}


class ChangedRun(UserError):
    """A run that is to go on would not end as it would have."""


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was."""

    words: str
    breaks: bool
    """Whether the run may end otherwise than it would have."""
    way_out: str | None = None
    """Where no run can go on with it, whatever is allowed."""


def made_with(
    config: Config,
    train: Any,
    heldout: Any,
    steps: StepCount,
    *,
    batches: dict[str, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """All that a run's numbers follow from, as far as it is known.

    Args:
        config: the run.
        train: its training rows.
        heldout: its held-out rows.
        steps: its optimizer steps.
        batches: what :data:`BATCHES` came to.
        dtype: of the arithmetic.
        device: where it trains.
    """
    files = {str(path): state_of(path) for path in all_files(config.data)}
    settings = [setting for setting in flatten(to_dict(config), "") if not setting.key.startswith(NOT_KEPT)]
    return {
        "config": {setting.key: setting.value for setting in settings},
        "batches": batches,
        "rows": {"training rows": rows_digest(train), "held-out rows": rows_digest(heldout)},
        # Size and time of the last change tell which file it was; the rows' digests tell whether it matters.
        "files": {path: list(state[:2]) for path, state in files.items() if state is not None},
        "base": digests_of_base(config),
        "steps": steps.total,
        "versions": {name: version_of(name) for name in PACKAGES},
        "dtype": str(dtype).removeprefix("torch."),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
        },
    }


def digests_of_base(config: Config) -> dict[str, str]:
    """See :func:`base_digests`; none for a base that is not the config's but a caller's own."""
    try:
        return base_digests(config.model)
    except UserError:
        return {}


def save(facts: dict[str, Any], folder: Path) -> None:
    """Write into a checkpoint folder."""
    (folder / FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def batches_of(then: dict[str, Any]) -> dict[str, bool]:
    """What :data:`BATCHES` came to, by :func:`made_with` of a run; all rows were padded before it said so."""
    grouping = then["config"].get("trainer.length_grouping", True)
    batches: dict[str, bool] = then.get("batches", dict(zip(BATCHES, (False, grouping), strict=True)))
    return batches


def was_padding_free(checkpoint: Checkpoint) -> bool:
    """Whether the run that wrote a checkpoint put rows one behind the other."""
    return FILE in checkpoint.files and batches_of(read_json(checkpoint.path / FILE))["trainer.padding_free"]


def changes_since(checkpoint: Checkpoint, now: dict[str, Any], config: Config) -> list[Change] | None:
    """What changed since a checkpoint was written, what breaks exactness first; None if it does not say.

    Args:
        checkpoint: where a run goes on from.
        now: :func:`made_with` of the run that goes on.
        config: of that run.
    """
    if FILE not in checkpoint.files:
        return None
    then = read_json(checkpoint.path / FILE)
    found = [*rows_changes(then, now), *base_changes(then, now, config)]
    found += [*config_changes(then, now, config), *package_changes(then, now, config)]
    if then["dtype"] != now["dtype"]:
        found.append(Change(f"the arithmetic was in {then['dtype']} and is in {now['dtype']}", True))
    for name, value in now["machine"].items():
        if then["machine"].get(name) != value:
            words = f"{MACHINE[name]} was {then['machine'].get(name)} and is {value}"
            found.append(Change(f"{words} (the result may differ in its last bits)", breaks=name == "device"))
    return sorted(found, key=lambda change: not change.breaks)


def rows_changes(then: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Rows that are others, and the files that changed."""
    found = [
        Change(f"the {name} are others", True) for name, digest in now["rows"].items() if then["rows"][name] != digest
    ]
    if not found:
        return []
    files = then["files"] | now["files"]
    for path in files:
        before, after = then["files"].get(path), now["files"].get(path)
        if before is None or after is None:
            found.append(Change(f"the data file {path} {'is new' if before is None else 'is used no more'}", True))
        elif before != after:
            size = f"had {before[0]:,} bytes and has {after[0]:,}" if before[0] != after[0] else "was written again"
            found.append(Change(f"the data file {path} {size}", True))
    return found


def base_changes(then: dict[str, Any], now: dict[str, Any], config: Config) -> list[Change]:
    """A base that is another one under its old name; checkpoints of earlier versions do not know theirs."""
    before, after, found = then.get("base", {}), now["base"], []
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            words = {
                "config": f"the config of the base model {config.model.path} is another",
                "weights": f"the weights of the base model {config.model.path} are others",
                "commit": f"the base model {config.model.path} was of commit {before[name]} and is of {after[name]}",
            }
            found.append(Change(words[name], True))
    return sorted(found, key=lambda change: change.words)


def another_base(run: RunDir, config: Config) -> list[str]:
    """What the user should know where a finished run's base is not the one that it was trained on, as far as its last
    checkpoint knows that."""
    for folder in reversed(found_checkpoints(run.checkpoints)):
        try:
            changes = base_changes(read_json(folder / FILE), {"base": digests_of_base(config)}, config)
        except (UserError, AttributeError):
            # The adapter does not need its checkpoints: a damaged one says nothing.
            continue
        return [f"the adapter was trained on another base: {change.words}" for change in changes]
    return []


def config_changes(then: dict[str, Any], now: dict[str, Any], config: Config) -> list[Change]:
    """Options that are others."""
    rows_differ = then["rows"] != now["rows"]
    found = []
    settings = {**then["config"], **batches_of(then)}, {**now["config"], **batches_of(now)}
    for key in dict.fromkeys([*settings[0], *settings[1]]):
        before, after = (setting.get(key) for setting in settings)
        if before == after:
            continue
        words, way_out = f"{key} was {shown(before)} and is {shown(after)}", None
        if key == "data.format" and "auto" in (before, after) and not rows_differ:
            # A run's own config has what was found out.
            continue
        if key.startswith("data."):
            # What the options make of the rows has been compared; packing also cuts them to a length.
            breaks = rows_differ or (key == "data.max_length" and config.trainer.packing)
        elif key in LENGTHS:
            breaks = then["steps"] != now["steps"] and not may_be_longer(config)
        elif key in DECIDING:
            breaks = config.trainer.keep_best or config.trainer.early_stopping_patience is not None
        else:
            breaks = not key.startswith(HARMLESS)
        if key == "optimizer.name" and kind_of_state(before) != kind_of_state(after):
            words += ", which cannot go on from the other's state"
            way_out = f"give {key}={before} as before, or start a new run"
        found.append(Change(words, breaks, way_out))
    return found


def kind_of_state(optimizer: Any) -> str:
    """What an optimizer of this name keeps; a paged one keeps the same elsewhere."""
    return str(optimizer).removeprefix("paged_")


def may_be_longer(config: Config) -> bool:
    """Whether a run's first steps do not depend on how many follow."""
    adapter = config.adapter
    moving = isinstance(adapter, QueryableConfig) and any(
        value is not None
        for value in (adapter.instruction_prior_final, adapter.prior_temperature_final, adapter.prior_kl_final)
    )
    return config.optimizer.schedule == "constant" and not moving


def package_changes(then: dict[str, Any], now: dict[str, Any], config: Config) -> list[Change]:
    """Packages in other versions."""
    eight_bit = config.quantization.kind != "none" or config.optimizer.name.endswith("8bit")
    found = []
    for name, version in now["versions"].items():
        before = then["versions"].get(name)
        if before != version:
            breaks = name in COMPUTE and (eight_bit or name != "bitsandbytes")
            found.append(Change(f"{name} was {before} and is {version}", breaks))
    return found


def shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def check_unchanged(checkpoint: Checkpoint, now: dict[str, Any], config: Config) -> list[str]:
    """What the user should know about changes since a checkpoint was written.

    Raises:
        ChangedRun: a change breaks exactness and ``resume.allow_changes`` is not set, or it makes the checkpoint's
            state unusable.
    """
    found = changes_since(checkpoint, now, config)
    if found is None:
        return [f"{checkpoint.path} does not say what it was made with: nothing is compared with this run's config"]
    refused = [change for change in found if change.way_out or (change.breaks and not config.resume.allow_changes)]
    if refused:
        allow = "make it what it was, or add resume.allow_changes=true: the run then ends otherwise than it would have"
        where = str(checkpoint.path)
        raise ChangedRun.many([Finding(change.words, where, change.way_out or allow) for change in refused])
    since = f"since {checkpoint.path.name}"
    return [
        f"warning: {since} {change.words}: the run ends otherwise than it would have"
        if change.breaks
        else f"{since} {change.words}"
        for change in found
    ]
