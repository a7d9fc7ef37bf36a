"""transformers' Trainer, with this project's loss, row order, evaluations, checkpoints and logs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qmemtune.adapters import parameter_groups
from qmemtune.adapters.queryable.statistics import RouteUse
from qmemtune.engine.ahead import BatchesAhead
from qmemtune.engine.checkpoints import WRITING
from qmemtune.engine.compiling import has_fused_layers, has_training_attention
from qmemtune.engine.environment import seconds_since_start
from qmemtune.engine.evaluations import Evaluations
from qmemtune.engine.fused import fused_layers
from qmemtune.engine.manifest import Checkpoint
from qmemtune.engine.parts import Parts
from qmemtune.engine.preflight import is_sharded
from qmemtune.engine.prior_schedule import PriorSchedule
from qmemtune.engine.replacing import replaced
from qmemtune.engine.resume import apply_settings, settings_of
from qmemtune.engine.rhythm import Rhythm
from qmemtune.engine.router_watch import RouterWatch, logged, scalars
from qmemtune.engine.saving import save_checkpoint, without_frozen_head
from qmemtune.engine.step_numbers import StepNumbers
from qmemtune.engine.totals import Stopwatch
from qmemtune.engine.tracking import guard_backends
from qmemtune.engine.walks import without_walks
from qmemtune.errors import Diverged
from qmemtune.models.attention import training_attention


class RunTrainer(Trainer):
    """Trains an adapter.

    Args:
        args: from :func:`qmemtune.engine.arguments.training_arguments`.
        parts: the task and everything else.
    """

    # The loss is normalised over the items (labelled tokens) of the whole step, in all processes.
    loss_is_scaled_for_ga = True

    # Trainer sets these; its module is not typed.
    optimizer: Any
    lr_scheduler: Any
    control: Any
    state: Any

    def __init__(self, args: TrainingArguments, parts: Parts) -> None:
        self.parts = parts
        task = parts.task
        super().__init__(model=task.model, args=args, data_collator=task.collator, train_dataset=task.rows)
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        guard_backends(self.callback_handler.callbacks, self._warn)
        # Before the logging back-ends, which close when training ends: the last evaluation is theirs too.
        self.callback_handler.callbacks.insert(0, Rhythm(parts.config, self, has_heldout=bool(parts.heldout)))
        self.router = RouterWatch(task.model, parts.config, parts.totals)
        self.prior_schedule = PriorSchedule(task.model, parts.config.adapter, parts.steps.total)
        self.evaluations = Evaluations(parts, self.prior_schedule, self.log)
        self._stopwatch = Stopwatch()
        self.step_numbers = StepNumbers(task, self.accelerator, args.device)
        self._loss: float | None = 0.0
        """Mean loss of the latest step; None if the step was left out."""
        self._settings: list[dict[str, Any]] | None = None
        """Of the optimizer's groups, by the config; None before there is one, and if it is DeepSpeed's own."""
        self._stopping = False
        """Whether a signal asked to stop."""
        self.ended = False
        """Whether it turned out before the first step that no step is to be made."""
        self.checkpoint_missing = False
        """Whether the latest checkpoint could not be written."""
        self.first_step_done_s: float | None = None
        """Seconds from the start of the process to the end of its first step; None before it."""
        self._trained: list[nn.Parameter] = []
        """What has gradients; empty where the model is not in one piece here."""
        self._ahead = BatchesAhead()
        self._in_training = ExitStack()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._fast_kernels(), self._in_training:
                return super().train(*args, **kwargs)
        finally:
            self._ahead.end()

    def only_finish(self, checkpoint: Checkpoint) -> None:
        """Do what comes after the last step, from a checkpoint of that step."""
        self.model.load_adapter(str(checkpoint.path), self.model.active_adapters[0], is_trainable=True)
        self.state.global_step = checkpoint.step
        with self._fast_kernels():
            self.catch_up()
            self.finish()

    @contextmanager
    def _fast_kernels(self) -> Iterator[None]:
        """Attention and fused layers compute in faster ways meanwhile."""
        config = self.parts.config
        attention = training_attention() if has_training_attention(config) else nullcontext()
        # Fused layers read weights that a sharded model holds only while it calls the layers themselves.
        fused = has_fused_layers(config) and not is_sharded(self.args)
        with attention, fused_layers(self.model) if fused else nullcontext():
            yield

    # Rows and order

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.parts.sampler

    def begin_epoch(self, epoch: int) -> None:
        self.parts.sampler.set_epoch(epoch)  # type: ignore[attr-defined]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of one optimizer step, and the items in them over all processes."""
        if self.ended:
            return [], None
        self._stopwatch.start()
        self.router.begin(self.state.global_step + 1)
        batches = self._ahead.take(epoch_iterator, num_batches)
        return batches, self.step_numbers.begin(batches)

    # Loss and optimizer

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One batch's passes."""
        whole = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if not self._trained and self.accelerator.distributed_type in whole:
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.train()
            self._in_training.enter_context(without_walks(model, self._trained))
        loss: Tensor = super().training_step(model, *args, **kwargs)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._trained_alone(model):
            return super()._clip_grad_norm(model)

    @contextmanager
    def _trained_alone(self, model: nn.Module) -> Iterator[None]:
        """``model.parameters()`` are those with gradients meanwhile, without a search."""
        if not self._trained:
            yield
            return
        with replaced(model, parameters=lambda recurse=True: iter(self._trained)):
            yield

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This batch's part of the step's loss."""
        return self.step_numbers.loss(model, inputs, num_items_in_batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The configured optimizer over the adapter's parameter groups."""
        if self.optimizer is None:
            target = self.model if model is None else model
            optimizer = self.parts.config.optimizer
            groups = parameter_groups(
                target,
                self.parts.config.adapter,
                learning_rate=optimizer.learning_rate,
                weight_decay=optimizer.weight_decay,
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(groups, **options)
            self._settings = settings_of(self.optimizer)
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        with self._trained_alone(model):
            self.step_numbers.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.step_numbers.grad_norm

    def check_step(self) -> None:
        """Take the step's mean loss over all processes; leave the step out if loss or gradient is no number."""
        if self._waits_for_a_device() and self.state.global_step + 1 < self.state.max_steps:
            # All of this step is under way there, and its numbers will be waited for.
            self._ahead.read()
        numbers = self.step_numbers.means()
        self._loss, step = numbers[0], self.state.global_step + 1
        if all(map(math.isfinite, numbers)):
            self.parts.bad_steps.take(step, numbers[0])
        elif math.isfinite(numbers[1]) and self._overflow_is_expected():
            return
        else:
            self._loss = None
            # An optimizer passes over parameters without a gradient: neither they nor its state change.
            self.optimizer.zero_grad()
            # Else Trainer's own sum would never be a number again.
            self._tr_loss.zero_()
            self.parts.bad_steps.skip(step, numbers[1], numbers[2], gather_object(self.step_numbers.origins()))
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise Diverged(
                    f"the loss of step {step} is {numbers[1]}, and DeepSpeed has applied its gradient already",
                    where=str(self.parts.bad_steps.log.path),
                    fix="go on from the last checkpoint with a lower optimizer.learning_rate "
                    "(resume=auto resume.allow_changes=true)",
                )

    def _waits_for_a_device(self) -> bool:
        return self.args.device.type == "cuda"

    def _overflow_is_expected(self) -> bool:
        """Whether the gradient of float16 training overflowed because the loss scale is still too high.

        The scaler leaves such a step out and lowers the scale.
        """
        return self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() > 1

    def saved(self, text: str) -> str:
        """``text``, which says where the latest state is saved, if it is."""
        return "its checkpoint could not be written" if self.checkpoint_missing else text

    def end_step(self) -> None:
        use = self.router.end(self.args.device, lambda table: self.accelerator.reduce(table, "sum"))
        seconds = self._stopwatch.seconds
        if self.first_step_done_s is None:
            self.first_step_done_s = round(seconds_since_start(), 3)
        if self._loss is None:
            self.parts.totals.add_skipped(seconds)
        else:
            self.parts.totals.add(self._loss, self.step_numbers.tokens, seconds)
        self.step_numbers.end()
        self.parts.progress.step(self.state.global_step, {"epoch": self.state.epoch, "step_s": seconds})
        if use is not None:
            self._log_routes(use)
        self.prior_schedule.go_to(self.state.global_step)
        # Asked once a step, in every process at the same place: a signal reaches them at different times.
        asked = torch.tensor(float(bool(self.parts.stop)), device=self.args.device)
        self._stopping = self.accelerator.reduce(asked, "sum").item() > 0

    def _log_routes(self, use: RouteUse) -> None:
        step = self.state.global_step
        self.log(scalars(use))
        self.parts.metrics.write({"event": "routes", "step": step, **logged(use)})
        warning = self.router.warning(step, use)
        if warning is not None:
            self._warn(warning)

    def _warn(self, message: str) -> None:
        self.parts.metrics.write({"event": "warning", "step": self.state.global_step, "message": message})
        self.parts.progress.message(message)

    def _look_at_files(self, *, now: bool = False) -> None:
        for path in self.parts.files.changed(now=now):
            self._warn(
                f"warning: {path} changed after its rows were read: the run trains on the rows as they were, "
                "and one that is resumed would read the new ones"
            )

    def stop_requested(self) -> bool:
        return self._stopping or self.parts.bad_steps.exhausted

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer's estimate walks over the whole model for every batch."""
        return 0

    # Logs and evaluations

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a logging step or an evaluation to metrics.jsonl, the display and the tracking back-ends."""
        if "train_loss" in logs:
            # Trainer's closing summary covers this process only; the run's own is made from its totals.
            return
        if "loss" in logs:
            window = self.parts.totals.take_window()
            logs["loss"] = window.loss / window.steps if window.steps else math.nan
            logs["tokens_per_s"] = window.tokens / window.seconds if window.seconds > 0 else 0.0
            logs |= self.prior_schedule.values()
            super().log(logs, start_time)
            line = {"event": "train", "step": self.state.global_step, **logs}
            self.parts.metrics.write(line)
            self.parts.progress.log(line)
            self._look_at_files()
        else:
            super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is due at this step, called by Trainer after logging and before saving."""
        metrics = self.evaluations.measure_due(self.state.global_step, self.model)
        self._stopping |= self.evaluations.abandoned
        if self.evaluations.stopped_early or self._stopping:
            self.control.should_training_stop = self.control.should_save = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def catch_up(self) -> None:
        """Before the first step: measure the base if that is due; after a resume, what a signal cut short."""
        step = self.state.global_step
        self.prior_schedule.go_to(step)
        if self.parts.heldout:
            self.evaluations.catch_up(step, self.model)
            self._stopping |= self.evaluations.abandoned
            self.ended = step > 0 and (self.evaluations.stopped_early or self._stopping)

    @property
    def complete(self) -> bool:
        """Whether all steps are done."""
        return self.state.global_step >= self.parts.steps.total

    @property
    def paused(self) -> bool:
        """Whether the run was to go no further than this step for now."""
        until = self.parts.until
        return until is not None and self.state.global_step >= until and not self.complete

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped the run before its end, be it in the last evaluation."""
        unfinished = self._stopping and not self.complete and not self.evaluations.stopped_early
        return self.evaluations.end_abandoned or (unfinished and not self.parts.bad_steps.exhausted)

    def finish(self) -> None:
        """After the last step: evaluate what the run ends with."""
        if self.interrupted or self.paused or self.parts.bad_steps.exhausted:
            return
        self._look_at_files(now=True)
        self.evaluations.end(self.state.global_step, self.model)

    # Checkpoints

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._settings is not None:
            apply_settings(self._settings, self.optimizer, self.lr_scheduler)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / WRITING)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_frozen_head(self.parts.task.model):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        write = partial(super()._save_checkpoint, model, trial)
        step = self.state.global_step
        self.checkpoint_missing = not save_checkpoint(self.parts, self.args, self.accelerator, step=step, write=write)
