"""Options of training: the optimizer with its schedule, and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class OptimizerConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = "adamw"
    """The update rule; the 8-bit ones keep their state in 8 bits through bitsandbytes."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapter."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the low-rank factors (cores have their own, see the adapter)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's two moment decays."""
    eps: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: float = 0.03
    """Warm-up: a share of all steps if below 1, else a number of optimizer steps."""


@dataclass
class TrainerConfig:
    """The training loop."""

    max_steps: int | None = None
    """Stop after so many optimizer steps; overrides num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the training rows."""
    per_device_train_batch_size: int = 8
    """Rows in one forward pass on one device."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimizer step."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this (0 switches clipping off)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant): less memory, about a third slower."""
    gradient_checkpointing_use_reentrant: bool = False
    """Use the reentrant variant; not possible with the queryable memory."""
    padding_free: bool | None = None
    """Put the rows of a batch one behind the other, kept apart in attention, positions, routes and loss, so that
    nothing is padded and batches can be of rows at random. If not set: on a CPU, where the model's attention goes row
    by row, and with packing and flash attention anywhere; not with routes of whole rows, reentrant checkpointing, or
    trainer.compile on a CPU. A resumed run keeps the form in which it began."""
    length_grouping: bool | None = None
    """Put rows of like length into one batch, so that little is padded. If not set: where rows are padded."""
    packing: bool = False
    """Pack rows into sequences of up to data.max_length tokens, kept apart in the same way; a batch then holds
    per_device_train_batch_size such sequences, and a step a changing number of rows."""
    logging_steps: int = 10
    """Log every so many optimizer steps."""
    route_stats_steps: int | None = 20
    """Queryable memory only: log how the router uses its atoms every so many optimizer steps, and warn when it has
    collapsed; never if null."""
    max_bad_steps: int = 5
    """Stop after so many optimizer steps in a row whose loss or gradient is no number. Each such step is left out and
    its rows are named in bad_steps.jsonl."""
    save_steps: int | None = None
    """Save a checkpoint every so many optimizer steps; if not set, at the end only (and when interrupted)."""
    save_total_limit: int | None = 2
    """Keep at most so many checkpoints."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations without a lower held-out loss."""
    keep_best: bool = False
    """End with the adapter of the evaluation with the lowest held-out loss."""
    fused_layers: bool = True
    """Adapted layers, RMS norms, gated units and rotary embeddings in fewer passes over memory, with less kept for the
    backward pass. The numbers differ in the last bits."""
    compile: bool = False
    """Compile the decoder for training steps (torch.compile): a minute or more before the first steps, shorter ones
    after. Takes the place of fused_layers. Needs Triton on a GPU, a C++ compiler on a CPU."""
    num_workers: int = 0
    """Processes that prepare batches beside the training process."""
    deterministic: bool = False
    """Use only deterministic kernels (slower on GPUs), and stop where an operation has none."""
    profile: bool = False
    """Profile steps 5 to 7: print the ten costliest operations, and write a trace into the run folder."""
