"""The typed schema: the only source of defaults, and the text of every option's help.

Each attribute's docstring says what it does and its unit. ``None`` means "not set". Adapter options live in
:mod:`qmemtune.config.adapters`, one dataclass a kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qmemtune.config.adapters import AdapterConfig, LoraConfig

MISSING: str = "???"
"""A value that must be given."""
CONVERSATIONS = ("messages", "sharegpt")
"""Row forms that are conversations and need a chat template."""
LIVE_FORMATS = ("live", "adapter")
"""Names of the one export format that is the adapter as trained."""


@dataclass
class MlpConfig:
    """model.path=generated:mlp only: the base of a regression, trained on the first function."""

    width: int = 64
    """Units of each hidden layer."""
    depth: int = 3
    """Hidden layers."""
    pretrain_steps: int = 3000
    """Optimizer steps on the first function, without noise."""


@dataclass
class ModelConfig:
    """The base model and its tokenizer."""

    path: str = MISSING
    """Hub id, local folder, GGUF file, package:NAME/FILE (a file inside an installed Python package), or
    generated:mlp (a regression's base)."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from path."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the arithmetic; auto takes bfloat16 where the hardware is fast at it, else float32."""
    attn_implementation: str | None = None
    """Attention kernel: sdpa, eager, flash_attention_2, ...; if not set transformers' choice, and in training on a
    CPU in bfloat16 a faster one of our own for short rows."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code on this machine."""
    mlp: MlpConfig = field(default_factory=MlpConfig)


@dataclass
class QuantizationConfig:
    """How the frozen base weights are stored."""

    kind: Literal["none", "nf4", "fp4", "int8"] = "none"
    """none keeps the compute dtype; nf4 and fp4 are 4-bit, int8 is 8-bit, all through bitsandbytes."""
    double_quant: bool = True
    """4-bit only: quantise the quantisation constants too (0.4 bit a weight less)."""
    dequantized_copies: Literal["auto", "never"] = "auto"
    """4-bit on a CPU: auto keeps a dequantised copy of each weight while training and generating, when all copies fit
    into a quarter of the free memory: the same numbers in less time, for more memory."""


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
    """Hub data sets only: the split that holds the rows."""
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
    """System prompt put before each conversation that has none."""


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
    """Hub data sets only: the split that holds the training rows."""
    eval_split: str | None = None
    """Hub data sets only: the split that holds the held-out rows."""
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
    """System prompt put before each conversation that has none."""
    loss_on: Literal["completion", "last_turn", "all"] = "completion"
    """Tokens in the loss: the completion (in a chat every assistant turn without weight: 0), in a chat only the last
    assistant turn, or all of them."""
    instruction: Literal["user", "system", "column", "none"] = "user"
    """Text given to the instruction prior: first user turn or prompt, system prompt, a mapped column, or none."""
    max_length: int = 1024
    """Longest row, in tokens; what is over is cut at the end and counted."""
    eval_fraction: float = 0.05
    """Share of the rows held out when there is no eval_path (0 holds none out)."""
    split_seed: int = 0
    """Seed of that split, apart from the run's seed so that runs can be compared."""
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
    length_grouping: bool = True
    """Put rows of like length into one batch, so that little is padded."""
    packing: bool = False
    """Pack rows into sequences of data.max_length tokens, kept apart in attention, positions, routes and loss; a batch
    then holds per_device_train_batch_size such sequences. Off, because rows of like length were faster on a CPU."""
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
    num_workers: int = 0
    """Processes that prepare batches beside the training process."""
    deterministic: bool = False
    """Use only deterministic kernels (slower on GPUs), and stop where an operation has none."""
    profile: bool = False
    """Profile steps 5 to 7: print the ten costliest operations, and write a trace into the run folder."""


@dataclass
class ExactMatchConfig:
    """Exact match of generated answers."""

    enabled: bool = False
    """Measure it (generation takes time)."""
    every_steps: int | None = None
    """During training, every so many optimizer steps; if not set, at the end only."""
    answer_pattern: str | None = None
    """Regular expression whose first group (or whole match) is the answer, in the output and in the reference."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    max_rows: int | None = None
    """Use at most so many held-out rows."""


@dataclass
class SamplesConfig:
    """Sample generations to read."""

    every_steps: int | None = None
    """During training, every so many optimizer steps; if not set, none."""
    count: int = 3
    """Held-out rows to answer."""
    max_new_tokens: int = 64
    """Longest sample, in tokens."""


@dataclass
class EvaluationConfig:
    """What is measured on held-out rows, and when."""

    every_steps: int | None = None
    """Held-out loss during training, every so many optimizer steps; if not set, at the end only."""
    at_start: bool = False
    """Held-out loss before the first step too: that of the base itself."""
    at_end: bool = True
    """Evaluate once more after the last step."""
    per_device_eval_batch_size: int = 16
    """Rows in one evaluation forward pass."""
    max_rows: int | None = None
    """Use at most so many held-out rows for the loss."""
    exact_match: ExactMatchConfig = field(default_factory=ExactMatchConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    tasks: list[str] = field(default_factory=list)
    """lm-evaluation-harness tasks that `qmemtune eval` runs too (needs the extra `eval`)."""
    tasks_limit: int | None = None
    """Use at most so many documents of each harness task."""


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
    """Held-out rows on which the exported model is compared with the live one."""
    max_kl: float = 0.05
    """Refuse an export whose mean KL(live || exported) is larger (nats a token)."""
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


@dataclass
class TrackingConfig:
    """Logging back-ends beside metrics.jsonl."""

    backends: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where metrics go too (needs the extra `tracking`)."""
    project: str = "qmemtune"
    """Project name at the back-end."""
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
