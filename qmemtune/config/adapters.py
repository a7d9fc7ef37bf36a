"""Adapter options, one dataclass a kind. ``ADAPTERS`` maps ``adapter.kind`` to its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

INITS_FROM_WEIGHTS = ("pissa", "olora")
"""LoRA initialisations that take their start out of the base's weights."""


@dataclass
class AdapterConfig:
    """Options that every adapter has."""

    kind: str = "lora"
    """lora, queryable or peft (any other method of PEFT)."""
    r: int = 16
    """Rank of the low-rank factors."""
    alpha: float | None = None
    """Scale: updates are multiplied by alpha / r (by alpha / sqrt(r) with rslora); if not set twice r, and PEFT's own
    value for its other methods."""
    dropout: float = 0.0
    """Dropout on the adapter's input during training."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers to adapt, or all-linear (every one but the output head)."""
    exclude_modules: list[str] = field(default_factory=list)
    """Names of layers to leave out."""
    layers_to_transform: list[int] | None = None
    """Indices of the decoder layers to adapt; all if not set."""


@dataclass
class LoraConfig(AdapterConfig):
    """LoRA, through PEFT."""

    kind: str = "lora"
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default"
    """Initialisation of the factors; default is PEFT's (A uniform, B zero)."""


@dataclass
class QueryableConfig(AdapterConfig):
    """Queryable memory: low-rank update atoms shared by all adapted layers."""

    kind: str = "queryable"
    num_atoms: int = 16
    """Atoms in the memory."""
    key_dim: int = 16
    """Width of queries and keys."""
    block_size: int = 5
    """Decoder layers, or linear layers of a regression's network, that share one route."""
    top_k: int | None = None
    """Atoms kept for a token; all if not set."""
    temperature: float = 1.0
    """Multiplies the routing logits."""
    router_norm: bool = True
    """RMS-normalise queries and keys, so that no routing logit exceeds temperature * sqrt(key_dim); without it routers
    collapse at high learning rates."""
    center_cores: bool = True
    """Take the atoms' mean out of their cores: what all atoms share, the factors of each layer can do themselves."""
    center_queries: bool = True
    """Queries read the low-rank state less that of the block's mean input (of the first training pass); without it all
    tokens' queries point much the same way."""
    depth_summary: bool = True
    """Let later blocks attend over the states of earlier ones."""
    granularity: Literal["token", "row"] = "token"
    """One route a token, or (for studies of the loss) one a row, formed from its prompt."""
    shared_atoms: bool = True
    """All blocks route over all atoms; if not, each over its own equal share (for studies)."""
    generated_core: bool = False
    """For studies: SiLU in place of the softmax over atoms, so that a small network makes the operator."""
    init_core_std: float = 0.02
    """Standard deviation of the cores at the start."""
    memory_learning_rate_multiplier: float = 5.0
    """Learning rate of memory and router, as a multiple of optimizer.learning_rate."""
    core_weight_decay: float = 0.0
    """Decoupled weight decay of the cores: pulls toward LoRA."""
    instruction_prior: float = 0.0
    """Weight (lambda) of the log-prior over atoms from the instruction's text; 0 switches it off."""
    prior_encoder: str = "base"
    """What embeds instructions: base (the base model's input embeddings) or a sentence-transformers folder."""
    prior_temperature: float = 1.0
    """Divides the prior's logits."""
    prior_kl: float = 0.0
    """Weight (beta) of the loss term KL(route without prior || prior)."""
    instruction_prior_final: float | None = None
    """Value that instruction_prior moves to in a straight line during training; it stays as it is if not set."""
    prior_temperature_final: float | None = None
    """The same for prior_temperature."""
    prior_kl_final: float | None = None
    """The same for prior_kl."""
    prior_schedule_share: float = 1.0
    """Share of the run's steps after which the final values are reached."""


@dataclass
class MethodConfig(AdapterConfig):
    """Any other method of PEFT, as a baseline: DoRA, VeRA, VB-LoRA, Lily, RandLoRA, ...

    ``r`` is the method's if it has one; ``alpha`` and ``dropout`` are handed on where they are set.
    """

    kind: str = "peft"
    method: str = "dora"
    """PEFT's name of the method (its PeftType, in small letters), or dora."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of the method's PEFT config, such as {num_vectors: 90}; the rest are PEFT's defaults."""


ADAPTERS: dict[str, type[AdapterConfig]] = {"lora": LoraConfig, "queryable": QueryableConfig, "peft": MethodConfig}


def uses_prior(adapter: QueryableConfig) -> bool:
    """Whether instructions have an effect at any point of the run."""
    return bool(adapter.instruction_prior or adapter.instruction_prior_final)
