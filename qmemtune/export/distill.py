"""A static LoRA trained to give the token distributions of the live, input-dependent model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import set_seed

from qmemtune.adapters import apply_adapter
from qmemtune.adapters.files import WEIGHTS
from qmemtune.adapters.queryable.fold import FoldedLayer, resized
from qmemtune.config.adapters import LoraConfig
from qmemtune.config.compose import Composed
from qmemtune.config.dump import to_dict
from qmemtune.config.evaluation import EvaluationConfig
from qmemtune.config.schema import Config, ResumeConfig, TrackingConfig
from qmemtune.config.settings import flatten
from qmemtune.config.training import TrainerConfig
from qmemtune.data.fingerprint import rows_digest
from qmemtune.data.prepared import PreparedData
from qmemtune.engine.batching import BatchForm
from qmemtune.engine.interrupt import Interrupted
from qmemtune.engine.language import LanguageTask
from qmemtune.engine.loss import LabelledLoss
from qmemtune.engine.made_with import HARMLESS, NOT_KEPT, digests_of_base
from qmemtune.engine.progress import Progress
from qmemtune.engine.restore import LoadedRun
from qmemtune.engine.run import train
from qmemtune.engine.task import Batch
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.labelled import LabelledLogits, LabelReader
from qmemtune.export.fidelity import fidelity
from qmemtune.export.lora import target_names
from qmemtune.export.updates import read_updates
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast
from qmemtune.models.loading import load_base
from qmemtune.rundir import RunDir, read_json

EVALUATIONS = 12
"""Of held-out KL during a distillation."""
PATIENCE = 3
"""Evaluations without a lower one after which it stops."""
HELD_OUT = 10
"""One calibration row in so many is held out."""
ENOUGH = 0.02
"""A start whose held-out KL is below this share of export.max_kl is not trained any further."""
NOT_NAMED = (*NOT_KEPT, *HARMLESS, "data.")
"""Keys, or starts of them, that change nothing about a distillation: what the data options make of the rows counts."""


def distilled(
    run: RunDir,
    live: LoadedRun,
    starts: Mapping[str, Mapping[str, FoldedLayer]],
    folded: Sequence[Any],
    data: PreparedData,
    progress: Progress,
) -> tuple[dict[str, FoldedLayer], dict[str, Any]]:
    """Distil the live model into a static LoRA, through the training engine.

    The work lies in the run folder: an interrupted distillation goes on, a finished one is not done again, whatever is
    to be made of it.

    Args:
        run: the run of the live model.
        starts: name of a fold -> its factors; the one with the lowest held-out KL is begun with.
        folded: the rows on which those were made.
        data: calibration rows to distil on; all in ``train``.

    Returns:
        The factors, and ``start``, ``steps``, ``kl_start``, ``kl`` (held-out, nats a token), ``rank``, ``rows``.

    Raises:
        Interrupted: a signal stopped it; a checkpoint is saved.
    """
    config = distillation_config(live, next(iter(starts.values())))
    task = Distillation(live, split(data), config)
    with dequantized_on_cpu(live.model), dequantized_on_cpu(task.model):
        found = {}
        for name, factors in starts.items():
            task.begin_with(factors)
            found[name] = task.kl()
        best = min(found, key=lambda name: found[name])
        kl_start = found[best]
        task.begin_with(starts[best])
        facts: dict[str, Any] = {"rank": config.adapter.r, "rows": len(data.train), "start": best}
        if kl_start <= ENOUGH * live.config.export.max_kl:
            progress.message(f"the fold is close enough as it is (held-out KL {kl_start:.2e}): nothing is distilled")
            return task.factors(), {**facts, "steps": 0, "kl_start": kl_start, "kl": kl_start}
        inner = RunDir(run.distilled / name_of(config, run, best, [folded, data.train]))
        config.run_dir = str(inner.path)
        if inner.summary.is_file():
            progress.message(f"taking the distillation in {inner.path}, which is finished")
            summary = read_json(inner.summary)
        else:
            progress.message(f"distilling into a LoRA of rank {config.adapter.r} (held-out KL {kl_start:.2e})")
            config.resume = ResumeConfig("auto")
            try:
                summary = train(
                    Composed(config, {}, config.recipe), progress=progress, make_task=lambda args, dtype: task
                )
            except Interrupted as error:
                raise Interrupted(
                    error.findings[0].problem,
                    where=str(inner.path),
                    fix="give the same command again: the distillation goes on",
                    signum=error.exit_code - 128,
                ) from None
    trained = {
        path: FoldedLayer(update.lora_A, update.lora_B, update.scaling)
        for path, update in read_updates(inner.adapter).items()
    }
    return trained, {**facts, "steps": summary["final_step"], "kl_start": kl_start, "kl": summary["best_loss"]}


def distillation_config(live: LoadedRun, start: Mapping[str, FoldedLayer]) -> Config:
    """The config of the training run that distils."""
    config, export = live.config, live.config.export
    scaling = next(iter(start.values())).scaling
    rank = export.rank or config.adapter.r
    every = max(1, export.distill_steps // EVALUATIONS)
    base = live.model.get_base_model()
    rate = export.distill_learning_rate or config.optimizer.learning_rate / 2
    return replace(
        config,
        adapter=LoraConfig(r=rank, alpha=scaling * rank, target_modules=target_names(base, set(start))),
        optimizer=replace(config.optimizer, learning_rate=rate, weight_decay=0.0, warmup_steps=0.1, schedule="cosine"),
        trainer=TrainerConfig(
            max_steps=export.distill_steps,
            per_device_train_batch_size=config.trainer.per_device_train_batch_size,
            gradient_accumulation_steps=config.trainer.gradient_accumulation_steps,
            # The teacher answers padded batches.
            padding_free=False,
            logging_steps=every,
            save_steps=every,
            save_total_limit=1,
            keep_best=True,
            early_stopping_patience=PATIENCE,
        ),
        evaluation=EvaluationConfig(
            every_steps=every,
            at_start=True,
            per_device_eval_batch_size=config.evaluation.per_device_eval_batch_size,
        ),
        tracking=TrackingConfig(),
        recipe="distillation",
        description=None,
    )


def name_of(config: Config, run: RunDir, start: str, rows: Sequence[Sequence[Any]]) -> str:
    """A folder's name that differs where the outcome would.

    Args:
        config: of the distillation.
        run: the run of the live model.
        start: the fold that is begun with.
        rows: those that were folded on, and those that are distilled on.
    """
    settings = {setting.key: setting.value for setting in flatten(to_dict(config), "")}
    facts = {
        "config": {key: value for key, value in settings.items() if not key.startswith(NOT_NAMED)},
        "base": digests_of_base(config),
        "start": start,
        "rows": [rows_digest(part) for part in rows],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with (run.adapter / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"r{config.adapter.r}-{digest.hexdigest()[:12]}"


def split(data: PreparedData) -> PreparedData:
    """One row in ten held out; a single row is both."""
    rows = data.train
    held = rows[::HELD_OUT]
    trained = rows.select([i for i in range(len(rows)) if i % HELD_OUT]) if len(rows) > 1 else rows
    return replace(data, train=trained, heldout=held)


class Distillation(LanguageTask):
    """KL(live || static LoRA) at labelled positions, measured by the same on held-out rows.

    Args:
        live: the teacher; its base weights are the student's, too.
        data: rows to train on, and held-out ones.
        config: of the distillation.
    """

    def __init__(self, live: LoadedRun, data: PreparedData, config: Config) -> None:
        self.live = live
        set_seed(config.seed)
        base = load_base(config.model, config.quantization, device=live.device)
        share_weights(base, live.model.get_base_model())
        student = apply_adapter(base, config.adapter, seed=config.seed)
        self.paths: list[str] = []
        self.rank, self.seed = config.adapter.r, config.seed
        form = BatchForm.of(config, live.device)
        super().__init__(student, live.tokenizer, data, config, form=form, device=live.device, dtype=live.dtype)
        self._reader = LabelReader(live.model, source=live.source, autocast=self._autocast)
        self._taught: LabelledLogits | None = None
        self.labelled_loss = LabelledLoss(student, loss_of=self._divergence)

    def begin_with(self, start: Mapping[str, FoldedLayer]) -> None:
        """Set the student's factors."""
        generator = torch.Generator().manual_seed(self.seed)
        base, self.paths = self.model.get_base_model(), list(start)
        with torch.no_grad():
            for path, layer in start.items():
                fitted = resized(layer, self.rank, generator=generator)
                target: Any = base.get_submodule(path)
                target.lora_A["default"].weight.copy_(fitted.lora_A)
                target.lora_B["default"].weight.copy_(fitted.lora_B)

    def _autocast(self) -> Any:
        return autocast(self.device, self.dtype)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """KL(live || student) summed over labelled tokens."""
        self._taught = self._reader.read(batch)
        return super().loss(model, batch)

    def _divergence(self, logits: Tensor, targets: Tensor, start: int) -> Tensor:
        assert self._taught is not None
        taught = self._taught.at(slice(start, start + len(targets))).log_softmax(dim=-1)
        return F.kl_div(logits.log_softmax(dim=-1), taught, reduction="sum", log_target=True)

    def evaluate(self, *, exact_match: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """``loss`` is the mean KL on held-out rows, nats a token."""
        found = fidelity(self.live, self.model, self.heldout)
        return {"loss": found["kl_mean"], "same_token": found["same_token"], "rows": found["rows"]}

    def kl(self) -> float:
        """Mean KL on held-out rows, nats a token."""
        with undisturbed(self.model):
            return float(fidelity(self.live, self.model, self.heldout)["kl_mean"])

    def resolved(self, config: Config) -> Config:
        """The config: its rows were prepared elsewhere."""
        return config

    def factors(self) -> dict[str, FoldedLayer]:
        """What the student holds now."""
        base = self.model.get_base_model()
        found = {}
        for path in self.paths:
            layer: Any = base.get_submodule(path)
            found[path] = FoldedLayer(
                layer.lora_A["default"].weight.detach().float().clone(),
                layer.lora_B["default"].weight.detach().float().clone(),
                layer.scaling["default"],
            )
        return found


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Let ``model`` hold the frozen weights of ``other``, an adapted copy of it, instead of its own."""
    for path, module in model.named_modules():
        theirs: Any = other.get_submodule(path)
        theirs = theirs.get_base_layer() if hasattr(theirs, "get_base_layer") else theirs
        for name, parameter in module._parameters.items():
            same = theirs._parameters.get(name)
            if parameter is not None and same is not None and same.shape == parameter.shape:
                module._parameters[name] = same
