"""The typed schema: the only source of defaults, and the text of every option's help.

Each attribute's docstring says what it does and its unit. ``None`` means "not set". The options of each group live in a
module beside this one (``model`` holds those of quantization, ``training`` those of optimizer and trainer); adapter
options in :mod:`qmemtune.config.adapters`, one dataclass a kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qmemtune.config.adapters import AdapterConfig, LoraConfig
from qmemtune.config.data import DataConfig
from qmemtune.config.evaluation import EvaluationConfig
from qmemtune.config.export import ExportConfig
from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.config.training import OptimizerConfig, TrainerConfig


@dataclass
class TrackingConfig:
    """Logging back-ends beside metrics.jsonl."""

    backends: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where metrics go too (needs the extra `tracking`)."""
    project: str = "qmemtune"
    """Project name at wandb and trackio; WANDB_PROJECT of the environment holds where this is left as it is."""
    name: str | None = None
    """Run name at the back-end; the run folder's name if not set."""


@dataclass
class ResumeConfig:
    """Going on with a run; resume=VALUE is short for resume.path=VALUE."""

    path: str | None = None
    """auto: go on from the newest complete checkpoint of run_dir; or the path of a checkpoint."""
    allow_changes: bool = False
    """Go on although config, rows or packages changed in a way that makes the run end otherwise than it would have."""


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=LoraConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    description: str | None = None
    """One line that says what the recipe is for."""
    needs: str | None = None
    """Hardware and downloads the recipe needs, one line."""
    recipe: str = "custom"
    """Name of the recipe; names the run folder."""
    run_dir: str | None = None
    """Run folder; runs/<recipe>/<timestamp> if not set."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    seed: int = 0
    """Seed of initialisation, row order and dropout."""
