"""How training rows form batches: without padding, by like length, packed, or at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.regression import is_regression
from qmemtune.config.schema import Config
from qmemtune.data.collate import Collator
from qmemtune.data.packing import PackCollator, PackedRows, without_padding
from qmemtune.data.rows import TokenRows
from qmemtune.data.sampler import LengthGroupedSampler
from qmemtune.engine.compiling import has_training_attention
from qmemtune.engine.made_with import BATCHES, was_padding_free
from qmemtune.engine.manifest import Checkpoint
from qmemtune.engine.sampler import SeededRandomSampler
from qmemtune.errors import UserError, first_line
from qmemtune.evaluation.guard import undisturbed
from qmemtune.models.attention import KERNEL, rows_of, training_attention
from qmemtune.models.hardware import autocast, is_out_of_memory
from qmemtune.models.head import decoder_of

APART = 0.05
"""Largest distance of a packed row's logits from those of the row alone, as a share of what a leak would make of it."""


@dataclass(frozen=True)
class BatchForm:
    """How training rows form batches."""

    packed: bool
    """In sequences of up to data.max_length tokens."""
    padding_free: bool
    """A batch's rows, or packs, one behind the other."""
    length_grouping: bool
    """Rows of like length in one batch; otherwise at random."""

    @classmethod
    def of(
        cls,
        config: Config,
        device: torch.device,
        *,
        base: nn.Module | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> BatchForm:
        """What a config comes to.

        Args:
            config: the run.
            device: where it trains.
            base: the base model, with or without its weights; one with transformers' ``sdpa`` attention if not given.
            checkpoint: where the run goes on from: it keeps the form in which it began.
        """
        trainer, adapter = config.trainer, config.adapter
        padding_free = trainer.padding_free
        if is_regression(config):
            padding_free = False
        elif padding_free is None and checkpoint is not None:
            padding_free = was_padding_free(checkpoint)
        elif padding_free is None:
            # Any other attention would compare all tokens of a batch with each other.
            row_by_row = has_training_attention(config) and (base is None or takes_attention(base))
            whole_routes = isinstance(adapter, QueryableConfig) and adapter.granularity == "row"
            reentrant = trainer.gradient_checkpointing and trainer.gradient_checkpointing_use_reentrant
            wanted = (device.type == "cpu" and row_by_row) or (trainer.packing and is_flash(config))
            padding_free = wanted and not whole_routes and not reentrant
        return cls.with_padding(config, padding_free=padding_free)

    @classmethod
    def with_padding(cls, config: Config, *, padding_free: bool) -> BatchForm:
        """The form of a run of which it is known whether its rows are padded."""
        grouping = config.trainer.length_grouping
        return cls(config.trainer.packing, padding_free, not padding_free if grouping is None else grouping)

    def settings(self) -> dict[str, bool]:
        """By the options' names, for :func:`qmemtune.engine.made_with.made_with`."""
        return {key: getattr(self, key.removeprefix("trainer.")) for key in BATCHES}


def is_flash(config: Config) -> bool:
    """Whether the run asks for FlashAttention, which tells the rows of a pack apart in a batch of one sequence only."""
    return "flash" in (config.model.attn_implementation or "")


def takes_attention(base: nn.Module) -> bool:
    """Whether a language model calls the attention that :func:`training_attention` puts in the place of ``sdpa``."""
    decoder = decoder_of(base)
    kernel = getattr(getattr(decoder, "config", None), "_attn_implementation", None)
    return kernel == KERNEL and getattr(decoder, "_supports_attention_backend", False)


class Batching:
    """Training rows as batches see them.

    Args:
        config: the run.
        form: of its batches.
        rows: tokenised training rows.
        pad_token_id: fills the end of short rows.
    """

    def __init__(self, config: Config, form: BatchForm, rows: TokenRows, pad_token_id: int) -> None:
        self.config, self.form = config, form
        self.source_rows = len(rows)
        self.rows: TokenRows | PackedRows = PackedRows(rows, config.data.max_length) if form.packed else rows
        if form.padding_free:
            self.collator: Callable[[Any], dict[str, Any]] = without_padding
        else:
            self.collator = PackCollator(pad_token_id) if form.packed else Collator(pad_token_id)

    def line(self, world_size: int = 1) -> str:
        """One line that says how batches are made, and how much of the first epoch's is padding."""
        how = "rows of like length together" if self.form.length_grouping else "rows at random"
        if self.form.packed:
            size = self.config.data.max_length
            how = f"{self.source_rows:,} rows packed into {len(self.rows):,} sequences of up to {size:,} tokens"
        if self.form.padding_free:
            return f"batches: {how}, one behind the other; no padding"
        return f"batches: {how}; {padding_share(self.rows.lengths, self.config, self.form, world_size):.1%} padding"


def row_order(lengths: Sequence[int], config: Config, form: BatchForm, world_size: int) -> Sampler[int]:
    """The order in which rows (or packs) of these lengths, in tokens, are trained on."""
    if form.length_grouping and not form.packed:
        return LengthGroupedSampler(lengths, config.trainer.per_device_train_batch_size * world_size, config.seed)
    return SeededRandomSampler(len(lengths), config.seed)


def batches_of_epoch(sizes: Sequence[int], order: Sampler[int], batch_size: int) -> list[np.ndarray]:
    """A number of each row, batch by batch."""
    rows = np.asarray(sizes)[np.fromiter(order, dtype=np.int64, count=len(sizes))]
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def padding_share(lengths: Sequence[int], config: Config, form: BatchForm, world_size: int) -> float:
    """Padding among the tokens of the first epoch's batches."""
    if form.padding_free:
        return 0.0
    order = row_order(lengths, config, form, world_size)
    batches = batches_of_epoch(lengths, order, config.trainer.per_device_train_batch_size)
    whole = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - sum(lengths) / whole if whole else 0.0


def check_rows_stay_apart(
    model: nn.Module,
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    padding_free: bool = True,
    own_attention: bool = True,
) -> None:
    """Find out whether this model's attention keeps rows of one sequence apart, with two of them.

    Args:
        model: the adapted model.
        key: the option that puts rows into one sequence.
        device: where the model is.
        dtype: of the arithmetic.
        padding_free: whether training says how long the rows are; otherwise positions alone tell them apart.
        own_attention: whether training runs with :func:`training_attention`.

    Raises:
        UserError: it does not, or takes no such sequence.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(13).mul(7919).remainder(vocabulary).unsqueeze(0).to(device)
    first, second = ids[:, :6], ids[:, 6:]
    positions = torch.cat([torch.arange(6), torch.arange(7)]).unsqueeze(0).to(device)

    def logits(**inputs: Any) -> Tensor:
        found: Tensor = model(**inputs, use_cache=False).logits.float()
        return found

    fix = f"set {key}=false" + ("" if takes_attention(model) else ", or model.attn_implementation=sdpa")
    try:
        with undisturbed(model), torch.no_grad(), autocast(device, dtype):
            alone = torch.cat([logits(input_ids=first), logits(input_ids=second)], dim=1)
            kernels = training_attention() if own_attention else nullcontext()
            # Attention in training is another than without gradients.
            with kernels, rows_of([6, 7] if padding_free else None), torch.enable_grad():
                # Of a batch with several sequences some kernels do not look at the positions.
                batch = 1 if padding_free else 2
                packed = logits(input_ids=ids.repeat(batch, 1), position_ids=positions.repeat(batch, 1))[:1].detach()
            joined = logits(input_ids=ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"this model takes no rows in one sequence: {type(error).__name__}: {first_line(error)}"
        raise UserError(problem, where=key, fix=fix) from error
    distance, leak = (packed - alone)[:, 6:].norm(), (joined - alone)[:, 6:].norm()
    if distance > APART * leak + 1e-4 * alone.norm():
        raise UserError(
            "this model's attention does not keep rows of one sequence apart "
            f"(distance {distance:.3g}, where a leak of the whole row would make {leak:.3g})",
            where=key,
            fix=fix,
        )


def settled(
    form: BatchForm, model: nn.Module, config: Config, *, device: torch.device, dtype: torch.dtype
) -> tuple[BatchForm, list[str]]:
    """The form that this model can have, and a line that says why, where it is another than the one given.

    Raises:
        UserError: the model mixes rows of one sequence, and the config asks for such sequences.
    """
    if not (form.packed or form.padding_free):
        return form, []
    key = "trainer.packing" if form.packed else "trainer.padding_free"
    try:
        own = has_training_attention(config)
        check_rows_stay_apart(model, key, device, dtype, padding_free=form.padding_free, own_attention=own)
    except UserError as error:
        if form.packed or config.trainer.padding_free is not None:
            raise
        return BatchForm.with_padding(config, padding_free=False), [f"rows are padded: {error.findings[0].problem}"]
    return form, []
