"""Options of ``qmemtune merge-export``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LIVE_FORMATS = ("live", "adapter")
"""Names of the one export format that is the adapter as trained."""


@dataclass
class ExportConfig:
    """What `qmemtune merge-export` writes."""

    format: Literal["merged", "lora", "live", "adapter"] = "merged"
    """merged: a plain Hugging Face folder; lora: a standard PEFT LoRA; live, also called adapter: the adapter as
    trained (always exact)."""
    path: str | None = None
    """Destination folder; if not set, export/<format> in the run folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of merged weights; auto keeps that of the base model's files."""
    base: Literal["auto", "dequantized", "original"] = "auto"
    """Merging a quantised run: into the dequantised weights it was trained beside, or into the original ones; auto
    measures both on calibration rows."""
    fold: Literal["distill", "least_squares", "mean"] = "distill"
    """Making a queryable memory static: mean route, least-squares operator of each layer, or a LoRA that starts there
    and is trained to give the live model's token distributions."""
    rank: int | None = None
    """Rank of the distilled LoRA; adapter.r if not set."""
    distill_steps: int = 300
    """Most optimizer steps of the distillation; it stops early when held-out KL falls no more."""
    distill_learning_rate: float | None = None
    """Peak learning rate of the distillation; half of the run's if not set."""
    distill_rows: int = 2048
    """Calibration rows to distil on, at most; a tenth of them is held out."""
    calibration: str | None = None
    """Rows for folding, distilling and comparing bases, such as a deployment's own; the training rows if not set. Of
    the same form as the training rows."""
    calibration_rows: int = 64
    """Calibration rows on which a memory is folded, and on which base=auto compares the two bases."""
    fidelity: bool = True
    """Load the export back and compare it with the live model; off, the model card says that nothing was measured."""
    fidelity_rows: int = 32
    """Held-out rows on which loss and token distributions of the exported model are compared with the live one's; for
    exact match it is evaluation.exact_match.max_rows."""
    max_kl: float = 0.05
    """Refuse an export whose mean KL(live || exported) is larger (nats a token); a fold below a fiftieth of it is not
    distilled."""
    max_loss_increase: float = 0.05
    """Refuse an export whose held-out loss is above the live model's by more (nats a token)."""
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Merged models only: also write a GGUF file of this type, through llama.cpp's converter."""
    license: str | None = None
    """Licence for the model card, such as apache-2.0; the base's and the data's apply in any case."""
    push_to_hub: str | None = None
    """Upload the export to this repository of the hub (NAME or OWNER/NAME)."""
    push_public: bool = False
    """Make a new repository public; private if not."""
    force: bool = False
    """Replace an earlier export, and keep one that is too far from the live model (its card says so)."""

    @property
    def is_live(self) -> bool:
        """Whether the export is the adapter as trained."""
        return self.format in LIVE_FORMATS
