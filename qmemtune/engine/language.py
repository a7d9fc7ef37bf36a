"""Fine-tuning a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler

from qmemtune.adapters import InstructionSource, auxiliary_loss, prompts_of
from qmemtune.config.schema import Config
from qmemtune.data.collate import model_inputs
from qmemtune.data.prepared import PreparedData
from qmemtune.data.rows import IGNORED
from qmemtune.data.targets import count_targets
from qmemtune.engine.batching import BatchForm, Batching, row_order, settled
from qmemtune.engine.loss import LabelledLoss
from qmemtune.engine.task import Batch, Task
from qmemtune.errors import UserError
from qmemtune.evaluation.evaluate import draw_samples, evaluate
from qmemtune.models.attention import rows_of
from qmemtune.models.head import PROBED


class LanguageTask(Task):
    """Next-token prediction at labelled positions, measured by held-out loss and exact match.

    Args:
        model: the adapted model.
        tokenizer: its tokenizer.
        data: tokenised rows.
        config: the run.
        form: of its batches; where the config does not ask for it, a model that mixes rows of one sequence gets padded
            batches instead.
        device: where the model is.
        dtype: of the arithmetic.
        copies: bytes of the dequantised copies of 4-bit weights that are kept meanwhile.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        data: PreparedData,
        config: Config,
        *,
        form: BatchForm,
        device: torch.device,
        dtype: torch.dtype,
        copies: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.copies = copies
        self.form, self._why_padded = settled(form, model, config, device=device, dtype=dtype)
        self.batching = Batching(config, self.form, data.train, tokenizer.pad_token_id)
        self.rows, self.heldout, self.report = self.batching.rows, data.heldout, data.report
        self.config, self.device, self.dtype = config.evaluation, device, dtype
        self.source = InstructionSource(model, tokenizer)
        self.collator = self.batching.collator
        prompt = torch.full(PROBED, IGNORED, device=device)
        with self.source.context([""]), prompts_of(self.source.memory, prompt, IGNORED):
            self.labelled_loss = LabelledLoss(model, lambda: auxiliary_loss(model), compiled=config.trainer.compile)
        if config.trainer.compile and self.labelled_loss.full_logits:
            raise UserError(
                f"{type(self.labelled_loss.lm).__name__} cannot be compiled here: its way to logits is not known",
                where="trainer.compile",
                fix="set it to false",
            )

    def count(self, batch: Batch) -> Tensor:
        """Labelled tokens, real tokens, and real tokens of rows with an instruction."""
        mask: Tensor = batch["attention_mask"]
        instructed = torch.tensor([bool(text) for text in batch["instruction"]], device=mask.device)
        if "instruction_row" in batch:
            instructed = instructed[batch["instruction_row"]]
        return torch.stack([count_targets(batch["labels"]), mask.sum(), mask[instructed].sum()])

    def origins(self, batch: Batch) -> list[str]:
        """File and line of each row."""
        origins: list[str] = batch["origin"]
        return origins

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over labelled tokens."""
        instructed = self.source.context(batch["instruction"], batch.get("instruction_row"))
        prompts = prompts_of(self.source.memory, batch["labels"], IGNORED)
        with instructed, prompts, rows_of(batch.get("row_lengths")), self.labelled_loss.installed():
            loss_sum, auxiliary = model(**model_inputs(batch))
        return loss_sum, auxiliary

    def evaluate(self, *, exact_match: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """See :func:`qmemtune.evaluation.evaluate.evaluate`."""
        return evaluate(
            self.model,
            self.tokenizer,
            self.heldout,
            self.config,
            source=self.source,
            device=self.device,
            dtype=self.dtype,
            exact_match=exact_match,
            progress=progress,
        ).as_dict()

    def samples(self) -> list[dict[str, Any]]:
        """Generated answers to a few held-out rows."""
        answered = draw_samples(
            self.model,
            self.tokenizer,
            self.heldout,
            self.config,
            source=self.source,
            device=self.device,
            dtype=self.dtype,
        )
        return [sample.as_dict() for sample in answered]

    def sampler(self, config: Config, world_size: int) -> Sampler[int]:
        """See :func:`row_order`."""
        return row_order(self.batching.rows.lengths, config, self.form, world_size)

    def notes(self, world_size: int) -> list[str]:
        """How batches are made, and what makes them faster and takes memory."""
        lines = [self.batching.line(world_size), *self._why_padded]
        if self.copies:
            lines.append(
                f"dequantised copies of the 4-bit weights make training faster and take {self.copies / 1e6:,.0f} MB "
                "(quantization.dequantized_copies)"
            )
        return lines

    def resolved(self, config: Config) -> Config:
        """The config with the row form that was recognised, so that prompts are rendered alike without the rows."""
        forms = {source.form for source in self.data.report.sources}
        if config.data.format != "auto" or forms != {self.data.format}:
            # Training and held-out rows of different forms: each has to be recognised again.
            return config
        return replace(config, data=replace(config.data, format=cast(Any, self.data.format)))

    def save_beside(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save_pretrained(folder)
