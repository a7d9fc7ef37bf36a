"""transformers' Trainer, with this project's loss, row order, evaluations, checkpoints and logs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
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
from qmemtune.engine import checkpoints
from qmemtune.engine.environment import seconds_since_start
from qmemtune.engine.heldout import Abandoned
from qmemtune.engine.own_state import save_own_state
from qmemtune.engine.parts import Parts as Parts
from qmemtune.engine.prior_schedule import PriorSchedule
from qmemtune.engine.rhythm import Due, Rhythm, due_at
from qmemtune.engine.router_watch import RouterWatch, logged, scalars
from qmemtune.engine.totals import Stopwatch
from qmemtune.engine.tracking import guard_backends
from qmemtune.errors import Diverged
from qmemtune.models.attention import short_rows_on_cpu
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.rundir import RunDir


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
        self._stopwatch = Stopwatch()
        # The task's loss, and all that is trained on (with the adapter's own term).
        self._step_losses = torch.zeros(2, device=args.device)
        # What Task.count counts, in all processes.
        self._step_counts = torch.ones(3, dtype=torch.long, device=args.device)
        self._batches: list[Any] = []
        self._grad_norm: Any = None
        self._loss: float | None = 0.0
        """Mean loss of the latest step; None if the step was left out."""
        self._stopping = False
        self._end_abandoned = False
        self.stopped_early = False
        self.ended = False
        """Whether it turned out before the first step that no step is to be made."""
        self.final_step = 0
        """Step whose adapter the model holds at the end."""
        self.final_metrics: dict[str, Any] = {}
        self.checkpoint_missing = False
        """Whether the latest checkpoint could not be written."""
        self.first_step_done_s: float | None = None
        """Seconds from the start of the process to the end of its first step; None before it."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._fast_kernels():
            return super().train(*args, **kwargs)

    def only_finish(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Do what comes after the last step, from a checkpoint of that step."""
        self.model.load_adapter(str(checkpoint.path), self.model.active_adapters[0], is_trainable=True)
        self.state.global_step = checkpoint.step
        with self._fast_kernels():
            self.catch_up()
            self.finish()

    @contextmanager
    def _fast_kernels(self) -> Iterator[None]:
        """On a CPU, 4-bit layers and attention over short rows compute in faster ways meanwhile."""
        chosen = self.parts.config.model.attn_implementation
        attention = short_rows_on_cpu() if chosen is None else nullcontext()
        with attention, dequantized_on_cpu(self.model, processes=self.args.world_size) as size:
            if size:
                self.parts.progress.message(
                    f"dequantised copies of the 4-bit weights make training faster and take {size / 1e6:,.0f} MB "
                    "(quantization.dequantized_copies)"
                )
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
        batches = self._batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        counts = torch.stack([self.parts.task.count(batch) for batch in batches]).sum(dim=0)
        self._step_counts = self.accelerator.reduce(counts.to(device), "sum")
        return batches, self._step_counts[0].clamp(min=1)

    # Loss and optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The task's loss summed over this batch's items, divided by the items of the whole step.

        The adapter's own term is added. Gradients are averaged over processes, so each multiplies by their number.
        """
        # The adapter's term is a mean over some of the batch's tokens: weigh it by their share.
        share = self.parts.task.count(inputs)[2] / self._step_counts[2].clamp(min=1)
        loss_sum, auxiliary = self.parts.task.loss(model, inputs)
        main = loss_sum * (self.accelerator.num_processes / num_items_in_batch)
        loss = main + auxiliary * (self.accelerator.num_processes * share)
        self._step_losses += torch.stack([main.detach(), loss.detach()])
        return loss

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
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def check_step(self) -> None:
        """Take the step's mean loss over all processes; leave the step out if loss or gradient is no number."""
        norm = self._grad_norm.full_tensor() if hasattr(self._grad_norm, "full_tensor") else self._grad_norm
        norm = torch.as_tensor(0.0 if norm is None else norm).to(self._step_losses).reshape(1)
        # One number that is none makes the mean over all processes none: they decide alike.
        numbers = self.accelerator.reduce(torch.cat([self._step_losses, norm]), "mean").tolist()
        self._step_losses = torch.zeros_like(self._step_losses)
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
            rows = [origin for batch in self._batches for origin in self.parts.task.origins(batch)]
            self.parts.bad_steps.skip(step, numbers[1], numbers[2], gather_object(rows))
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise Diverged(
                    f"the loss of step {step} is {numbers[1]}, and DeepSpeed has applied its gradient already",
                    where=str(self.parts.bad_steps.log.path),
                    fix="go on from the last checkpoint with a lower optimizer.learning_rate",
                )

    def _overflow_is_expected(self) -> bool:
        """Whether the gradient of float16 training overflowed because the loss scale is still too high.

        The scaler leaves such a step out and lowers the scale.
        """
        return self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() > 1

    def saved(self, text: str) -> str:
        """``text``, which says where the latest state is saved, if it is."""
        return "its checkpoint could not be written" if self.checkpoint_missing else text

    def diverged(self) -> Diverged:
        """The error of a run that too many bad steps ended."""
        bad, step = self.parts.bad_steps, self.state.global_step
        steps = f"the last {bad.in_a_row} steps were" if bad.in_a_row > 1 else "the last step was"
        return Diverged(
            f"{steps} left out because loss or gradient is no number ({bad.latest} at step {step}); "
            + self.saved(f"the state before them is kept in checkpoint-{step}"),
            where=str(bad.log.path),
            fix="look at the rows named there, lower optimizer.learning_rate, or use model.compute_dtype=float32",
        )

    def end_step(self) -> None:
        use = self.router.end(self.args.device, lambda table: self.accelerator.reduce(table, "sum"))
        seconds = self._stopwatch.seconds
        if self.first_step_done_s is None:
            self.first_step_done_s = round(seconds_since_start(), 3)
        if self._loss is None:
            self.parts.totals.add_skipped(seconds)
        else:
            self.parts.totals.add(self._loss, int(self._step_counts[1].item()), seconds)
        self._batches = []
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
        metrics = self.measure_due()
        if self.stopped_early or self._stopping:
            self.control.should_training_stop = self.control.should_save = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def catch_up(self) -> None:
        """Before the first step: measure the base if that is due; after a resume, what a signal cut short."""
        step = self.state.global_step
        self.prior_schedule.go_to(step)
        if not self.parts.heldout:
            return
        if step > 0:
            self.measure_due()
            self.ended = self.stopped_early or self._stopping
        elif self.parts.config.evaluation.at_start:
            try:
                self.measure_as(0, exact_match=False)
            except Abandoned:
                self._stopping = True

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
        unfinished = self._stopping and not self.complete and not self.stopped_early
        return self._end_abandoned or (unfinished and not self.parts.bad_steps.exhausted)

    def measure_due(self) -> dict[str, Any]:
        """Measure what is due at the current step, unless that was done, and see whether the run stops early."""
        metrics: dict[str, Any] = {}
        step = self.state.global_step
        due = due_at(step, self.parts.config)
        try:
            if due and self.parts.heldout.measured.done_at != step:
                metrics = self.measure(due)
        except Abandoned:
            # The step itself is whole; the evaluation is made up for when the run goes on.
            self._stopping = True
        patience = self.parts.config.trainer.early_stopping_patience
        if patience and self.parts.best.evaluations_since >= patience and not self.complete:
            self.stopped_early = True
        return metrics

    def measure(self, due: Due) -> dict[str, Any]:
        """Measure held-out rows at the current step, log the result and compare its loss to the best one."""
        step, metrics = self.state.global_step, {}
        if due.loss or due.exact_match:
            metrics = self.measure_as(step, exact_match=due.exact_match)
            self.parts.best.update(step, metrics["loss"], self.model)
        # Last: a measurement that a signal cuts short is made again, samples that are written are not.
        if due.samples:
            self.parts.heldout.write_samples(step)
        self.parts.heldout.measured.done_at = step
        return metrics

    def measure_as(self, step: int, *, exact_match: bool) -> dict[str, Any]:
        """Measure the model, which holds the adapter of ``step``, unless that was done, and log the result."""
        known = self.parts.heldout.known(step, exact_match=exact_match)
        if known is not None:
            return known
        metrics = self.parts.heldout.measure(step, exact_match=exact_match)
        self.log({f"eval_{name}": value for name, value in metrics.items() if isinstance(value, float)})
        line = {"event": "evaluation", "step": step, **metrics}
        self.parts.metrics.write(line)
        self.parts.progress.evaluation(line)
        return metrics

    def finish(self) -> None:
        """After the last step: go back to the best adapter if it is to be kept, and evaluate what the run ends with."""
        if self.interrupted or self.paused or self.parts.bad_steps.exhausted:
            return
        try:
            self._finish()
        except Abandoned:
            # The checkpoint of the last step is saved: resuming only evaluates and writes the adapter.
            self._end_abandoned = True

    def _finish(self) -> None:
        config, best, heldout = self.parts.config, self.parts.best, self.parts.heldout
        self._look_at_files(now=True)
        self.final_step = self.state.global_step
        self.prior_schedule.go_to(self.final_step)
        at_end = config.evaluation.at_end and bool(heldout)
        if config.trainer.keep_best and at_end:
            self.measure(Due(loss=True, exact_match=False, samples=False))
        if best.restore(self.model) and best.step is not None:
            self.final_step = best.step
            self.prior_schedule.go_to(self.final_step)
        if at_end:
            self.final_metrics = self.measure_as(self.final_step, exact_match=config.evaluation.exact_match.enabled)
        else:
            self.final_metrics = heldout.known(self.final_step, exact_match=False) or {}

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / checkpoints.WRITING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root, writer = Path(self.args.output_dir), self.args.should_save
        name, unwritten = f"checkpoint-{self.state.global_step}", self.parts.unwritten
        with unwritten.instead(name):
            if writer:
                checkpoints.begin(root)
        self.accelerator.wait_for_everyone()
        with unwritten.instead(name):
            super()._save_checkpoint(model, trial)
        # A checkpoint is whole when every process has written its part.
        failed = torch.tensor(float(name in unwritten.reasons), device=self.args.device)
        self.checkpoint_missing = self.accelerator.reduce(failed, "sum").item() > 0
        if writer and not self.checkpoint_missing:
            with unwritten.instead(name):
                self._complete_checkpoint(root / checkpoints.WRITING / name, root)
            self.checkpoint_missing = name in unwritten.reasons
        if writer and self.checkpoint_missing:
            shutil.rmtree(root / checkpoints.WRITING, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _complete_checkpoint(self, written: Path, root: Path) -> None:
        facts = save_own_state(self.parts, written, RunDir(root.parent), self.state.global_step)
        newest = checkpoints.complete(written, root, {**facts, "world_size": self.args.world_size})
        if not self.parts.bad_steps.exhausted:
            # Weights that lead to bad steps only may be worse than those of every earlier checkpoint.
            checkpoints.rotate(root, self.parts.config.trainer.save_total_limit, newest=newest)
