"""The largest batch of a run, which is what its memory follows from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.utils.data import Sampler

from qmemtune.config.schema import Config
from qmemtune.data.packing import PackedRows
from qmemtune.data.rows import TokenRows
from qmemtune.engine.batching import BatchForm, batches_of_epoch, row_order

MOST_EPOCHS = 5
"""Epochs whose batches are looked at for the largest."""


@dataclass(frozen=True)
class Workload:
    """The largest batch of a run."""

    rows: int
    tokens: int
    """Of its longest row."""
    labelled: int
    """Tokens in the loss."""
    accumulation: int = 1
    """Batches in one optimizer step."""
    checkpointing: bool = False
    together: int | None = None
    """Tokens of all rows, where they stand one behind the other; None where they are padded to the longest."""

    @classmethod
    def of(
        cls,
        config: Config,
        form: BatchForm,
        made: TokenRows | PackedRows | None = None,
        *,
        epochs: float = 1.0,
        world_size: int = 1,
    ) -> Workload:
        """That of a config.

        Args:
            config: the run.
            form: of its batches.
            made: its training rows as batches see them; all rows have data.max_length tokens if there are none.
            epochs: passes over them.
            world_size: processes of the run.
        """
        rows = config.trainer.per_device_train_batch_size
        if made is not None:
            rows = min(rows, len(made))
        tokens = config.data.max_length if made is None else max(made.lengths)
        together = labelled = rows * tokens
        if made is not None:
            labelled = sum(sorted(made.loss_lengths, reverse=True)[:rows])
            if form.padding_free:
                order = row_order(made.lengths, config, form, world_size)
                together, labelled = largest_batches(made, order, rows, epochs)
        return cls(
            rows=rows,
            tokens=tokens,
            labelled=max(labelled, 1),
            accumulation=config.trainer.gradient_accumulation_steps,
            checkpointing=config.trainer.gradient_checkpointing,
            together=together if form.padding_free else None,
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row with its padding; of rows one behind the other the longest, and the others alike."""
        if self.together is None or self.rows == 1:
            return [self.tokens] * self.rows
        others = self.rows - 1
        share, more = divmod(self.together - self.tokens, others)
        return [share] * (others - more) + [share + 1] * more + [self.tokens]

    def with_rows(self, rows: int) -> Workload:
        """The same rows, fewer or more of them, in as many a step as before where that is possible."""
        # The longest row may be among the fewer ones.
        return self._with(rows, self.tokens, lambda together: max(together * rows // self.rows, self.tokens))

    def with_tokens(self, tokens: int) -> Workload:
        """The same rows, cut to fewer tokens."""
        tokens = min(tokens, self.tokens)
        return self._with(self.rows, tokens, lambda together: min(together, self.rows * tokens))

    def _with(self, rows: int, tokens: int, changed: Callable[[int], int]) -> Workload:
        together = None if self.together is None else changed(self.together)
        before, after = self.together or self.rows * self.tokens, together or rows * tokens
        return replace(
            self,
            rows=rows,
            tokens=tokens,
            labelled=max(self.labelled * after // before, 1),
            accumulation=max(round(self.rows * self.accumulation / rows), 1),
            together=together,
        )


def largest_batches(made: TokenRows | PackedRows, order: Sampler[int], rows: int, epochs: float) -> tuple[int, int]:
    """Most tokens, and most tokens in the loss, that rows of one batch have together; their order is known.

    Args:
        made: training rows as batches see them.
        order: of them, by epoch.
        rows: of a batch.
        epochs: passes over the rows; after a few, more of them find little more.
    """
    sizes, most = (made.lengths, made.loss_lengths), [0, 0]
    for epoch in range(min(math.ceil(epochs), MOST_EPOCHS)):
        order.set_epoch(epoch)  # type: ignore[attr-defined]
        for i, of_rows in enumerate(sizes):
            most[i] = max(most[i], *(int(batch.sum()) for batch in batches_of_epoch(of_rows, order, rows)))
    return most[0], most[1]
