"""Options of the queryable memory as a PEFT config."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from qmemtune.adapters.queryable.prior import moved
from qmemtune.adapters.queryable.registration import QUERYABLE

BASE_ENCODER = "base"
"""Name of the encoder that is the base model's own input embeddings."""


@dataclass
class QueryableMemoryConfig(PeftConfig):
    """Config of a queryable memory: low-rank update atoms shared by all adapted layers.

    An adapted linear layer computes ``W x + (alpha / r) * B (z + sum_m w_m Delta_m z)`` with ``z = A x``; the route
    ``w`` over the ``num_atoms`` atoms is formed once a token and block of layers. Without atoms (all cores zero) it is
    LoRA. Source: "Queryable LoRA", arXiv 2605.08423.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    r: int = field(default=8, metadata={"help": "Rank of the low-rank factors A and B."})
    alpha: float | None = field(default=None, metadata={"help": "Updates are multiplied by alpha / r; 2 r if None."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A during training."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) of linear layers, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names to leave out."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt; all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the decoder layers, if not a common one."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    num_atoms: int = field(default=16, metadata={"help": "Atoms in the memory."})
    key_dim: int = field(default=16, metadata={"help": "Width of queries and keys."})
    block_size: int = field(default=5, metadata={"help": "Decoder layers (in an MLP: linear layers) sharing a route."})
    top_k: int | None = field(default=None, metadata={"help": "Atoms kept for a token; all if None."})
    temperature: float = field(default=1.0, metadata={"help": "Multiplies the routing logits."})
    router_norm: bool | None = field(
        default=None,
        metadata={"help": "RMS-normalise queries and keys, so |logit| <= temperature * sqrt(key_dim); on if None."},
    )
    center_cores: bool | None = field(
        default=None,
        metadata={"help": "Take the atoms' mean out of their cores: A and B can do that themselves; on if None."},
    )
    center_queries: bool | None = field(
        default=None,
        metadata={"help": "Queries read A (x - mean x) with the mean of the first training pass, not A x; on if None."},
    )
    depth_summary: bool = field(default=True, metadata={"help": "Queries attend over the states of earlier blocks."})
    init_core_std: float = field(default=0.02, metadata={"help": "Standard deviation of the cores at the start."})
    granularity: str = field(
        default="token", metadata={"help": "'token', or 'row': one route a row, from its prompt; for studies."}
    )
    shared_atoms: bool = field(
        default=True, metadata={"help": "False: each block routes over its own equal share of the atoms; for studies."}
    )
    generated_core: bool = field(
        default=False,
        metadata={"help": "SiLU in place of softmax, no prior: a small network makes the operator; for studies."},
    )
    instruction_prior: float = field(
        default=0.0, metadata={"help": "Weight (lambda) of the log-prior over atoms from the instruction; 0: none."}
    )
    prior_encoder: str = field(
        default="base", metadata={"help": "'base' (the model's input embeddings) or a sentence-transformers folder."}
    )
    prior_encoder_digest: str | None = field(
        default=None, metadata={"help": "Digest of the sentence encoder's files; filled in when it is first used."}
    )
    prior_dim: int | None = field(
        default=None, metadata={"help": "Width of instruction embeddings; for 'base' taken from the model."}
    )
    prior_temperature: float = field(default=1.0, metadata={"help": "Divides the prior's logits."})
    prior_kl: float = field(default=0.0, metadata={"help": "Weight (beta) of KL(route without prior || prior)."})
    instruction_prior_final: float | None = field(
        default=None, metadata={"help": "Value that instruction_prior moves to with prior_progress; constant if None."}
    )
    prior_temperature_final: float | None = field(
        default=None, metadata={"help": "Value that prior_temperature moves to; constant if None."}
    )
    prior_kl_final: float | None = field(
        default=None, metadata={"help": "Value that prior_kl moves to; constant if None."}
    )
    prior_progress: float = field(
        default=0.0,
        metadata={"help": "Share of the way to the final values that is done, 0 to 1; training moves it."},
    )

    def __post_init__(self) -> None:
        # A saved adapter names its version; one that does not name these options is older than they are.
        is_older = self.peft_version is not None
        for name in ("router_norm", "center_cores", "center_queries"):
            if getattr(self, name) is None:
                setattr(self, name, not is_older)
        super().__post_init__()
        self.peft_type = QUERYABLE
        if self.alpha is None:
            self.alpha = 2.0 * self.r
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        for name in (
            "alpha", "dropout", "temperature", "init_core_std", "instruction_prior", "prior_temperature", "prior_kl",
            "instruction_prior_final", "prior_temperature_final", "prior_kl_final",
        ):  # fmt: skip
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        for name in ("r", "num_atoms", "key_dim", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_atoms:
            raise ValueError(f"top_k must be between 1 and num_atoms ({self.num_atoms}), got {self.top_k}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        for name in ("temperature", "prior_temperature", "prior_temperature_final"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("init_core_std", "instruction_prior", "prior_kl", "instruction_prior_final", "prior_kl_final"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.prior_progress <= 1.0:
            raise ValueError(f"prior_progress must be between 0 and 1, got {self.prior_progress}")
        if self.granularity not in ("token", "row"):
            raise ValueError(f"granularity must be 'token' or 'row', got {self.granularity!r}")
        if self.generated_core and (self.top_k is not None or self.has_prior):
            raise ValueError("generated_core has no route: leave out top_k and instruction_prior")
        if self.has_prior_kl and not self.has_prior:
            raise ValueError("prior_kl has no effect while instruction_prior is 0: set instruction_prior")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, for saving: a sentence encoder is known by name and digest, not by its place on this machine."""
        values = dict(super().to_dict())
        values["prior_encoder"] = self.encoder_name
        return values

    @property
    def uses_base_encoder(self) -> bool:
        """Whether the encoder is the base model's own embeddings, and not a folder that is called like them."""
        return self.prior_encoder == BASE_ENCODER and self.prior_encoder_digest is None

    @property
    def encoder_name(self) -> str:
        """What a saved adapter calls its encoder: ``base``, or the name of its folder."""
        # In full, as "." has no name of its own; a link keeps its name.
        return Path(os.path.abspath(Path(self.prior_encoder).expanduser())).name

    @property
    def has_prior(self) -> bool:
        """Whether instructions may have an effect, now or at another point of the schedule."""
        return bool(self.instruction_prior or self.instruction_prior_final)

    @property
    def has_prior_kl(self) -> bool:
        """The same of the loss term."""
        return bool(self.prior_kl or self.prior_kl_final)

    @property
    def current_prior(self) -> float:
        """lambda, at the schedule's present point."""
        return moved(self.instruction_prior, self.instruction_prior_final, self.prior_progress)

    @property
    def current_prior_temperature(self) -> float:
        """tau_u, at the schedule's present point."""
        return moved(self.prior_temperature, self.prior_temperature_final, self.prior_progress)

    @property
    def current_prior_kl(self) -> float:
        """beta, at the schedule's present point."""
        return moved(self.prior_kl, self.prior_kl_final, self.prior_progress)

    @property
    def scaling(self) -> float:
        """Factor of the low-rank update, ``alpha / r``."""
        assert self.alpha is not None
        return self.alpha / self.r
