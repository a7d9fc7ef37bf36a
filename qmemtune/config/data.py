"""Options of the rows: where they come from, their form, and what of them is in the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qmemtune.config.missing import MISSING

CONVERSATIONS = ("messages", "sharegpt")
"""Row forms that are conversations and need a chat template."""


@dataclass
class RegressionDataConfig:
    """data.path=generated:noisy_regression only: a function to adapt to, and noisy rows of it."""

    rows: int = 20_000
    """Training rows."""
    noise_std: float = 0.3
    """Standard deviation of the noise on training targets; held-out targets have none."""
    heldout_rows: int = 4_096
    """Held-out rows."""
    inputs: int = 16
    """Width of an input; inputs are standard normal."""
    outputs: int = 1
    """Width of a target; the first function's outputs have unit variance."""
    regions: int = 4
    """Regions of the input space, each with a correction of its own."""
    correction_rank: int = 1
    """Directions of the input that a region's correction depends on."""
    correction_std: float = 1.0
    """Standard deviation of the correction: the second function less the first."""
    sharpness: float = 8.0
    """How sharply regions are divided: a factor on the logits of their soft borders."""
    seed: int | None = None
    """Seed of functions, rows and noise; the run's seed if not set."""


@dataclass
class SourceConfig:
    """One of several sets of training rows that are mixed. What is not set is as in data."""

    path: str = MISSING
    """Its rows: files, a glob, a folder, a hub data set id, or generated:NAME."""
    weight: float = 1.0
    """How often each of its rows is used in one pass: 2 uses all of them twice, 0.5 half of them."""
    name: str | None = None
    """Hub data sets only: the configuration's name."""
    split: str | None = None
    """The split that holds the rows, of a hub data set or of a folder that has splits."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text"] | None = None
    """Row form."""
    columns: dict[str, str] = field(default_factory=dict)
    """Mapping from a field of the row form to the column that holds it, in place of that in data."""
    prompt_template: str | None = None
    """Text in which {field} is replaced by a row's columns."""
    completion_template: str | None = None
    """The same for the completion."""
    remove_pattern: str | None = None
    """Regular expression; what it matches is removed from completions and reference answers."""
    system: str | None = None
    """System prompt put before each conversation, or plain prompt, that has none."""


@dataclass
class DataConfig:
    """Rows, their form, and what of them is in the loss."""

    path: str = MISSING
    """Training rows: a json, jsonl, csv, tsv, parquet or arrow file (also .gz), a glob or folder of such files, a hub
    data set id, or generated:NAME."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sets of training rows in place of path, by a name of yours: sources.NAME.path, .weight, ..."""
    eval_path: str | None = None
    """Held-out rows, of the same kinds as path; if not set they are split off the training rows."""
    name: str | None = None
    """Hub data sets only: the configuration's name."""
    split: str = "train"
    """The split that holds the training rows, of a hub data set or of a folder that has splits."""
    eval_split: str | None = None
    """The split that holds the held-out rows, of the same data set or folder."""
    streaming: bool = False
    """Read rows one after another, those of the hub without storing the data set, and no more than max_train_rows and
    max_eval_rows need."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text"] = "auto"
    """Row form; auto recognises it by the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Mapping from a field of the row form to the column that holds it, e.g. {prompt: question}."""
    prompt_template: str | None = None
    """Text in which {field} is replaced by a row's columns; replaces the form's own prompt."""
    completion_template: str | None = None
    """The same for the completion."""
    remove_pattern: str | None = None
    """Regular expression; what it matches is removed from completions and reference answers."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Render with the tokenizer's chat template: auto does it for messages and sharegpt rows only."""
    system: str | None = None
    """System prompt put before each conversation, or plain prompt, that has none."""
    loss_on: Literal["completion", "last_turn", "all"] = "completion"
    """Tokens in the loss: the completion (in a chat every assistant turn without weight: 0), in a chat only the last
    assistant turn, or all of them."""
    instruction: Literal["user", "system", "column", "none"] = "user"
    """Text given to the instruction prior. user: the instruction column of alpaca and prompt_completion rows, the
    prompt where there is none, the first user turn of a chat; system: the system prompt; column: the instruction column
    of any form, or the one that columns.instruction names; or none."""
    max_length: int = 1024
    """Longest row, in tokens; what is over is cut at the end and counted."""
    eval_fraction: float = 0.05
    """Share of the rows held out when there is no eval_path (0 holds none out)."""
    split_seed: int = 0
    """Seed of that split, and of which rows stand for the fraction of a source's weight; apart from the run's seed, so
    that runs can be compared."""
    max_train_rows: int | None = None
    """Use at most so many training rows (the first ones after the split)."""
    max_eval_rows: int | None = None
    """Use at most so many held-out rows."""
    max_rejected: float = 0.01
    """Stop when more rows than this are unusable: a share below 1, else a count."""
    cache: bool = True
    """Keep tokenised rows in $QMEMTUNE_CACHE (else ~/.cache/qmemtune), for the next run with the same files, tokenizer,
    template and options."""
    group_by: str | None = None
    """Column whose values split evaluation results into groups."""
    regression: RegressionDataConfig = field(default_factory=RegressionDataConfig)


def is_chat(config: DataConfig, form: str) -> bool:
    """Whether rows of this form are rendered with the tokenizer's chat template."""
    return form in CONVERSATIONS or config.chat == "always"
