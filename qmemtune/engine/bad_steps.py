"""Steps that must not be applied (loss or gradient is no number), and steps whose loss jumps."""

from __future__ import annotations

import math
from statistics import median

from qmemtune.engine.metrics_log import JsonLines
from qmemtune.engine.progress import Progress
from qmemtune.engine.totals import Totals
from qmemtune.errors import Diverged

NEEDED = 20
"""Losses that say what is usual; before, nothing counts as a jump."""
SPREADS = 6.0
"""A jump is so many standard deviations (by the median deviation) above the usual loss, ..."""
SHARE = 0.5
"""... and by at least this share of it."""
TOLD = 3
"""Jumps that are told in words; all of them are logged."""


class BadSteps:
    """Counts bad steps and names their rows.

    Args:
        limit: so many in a row end the run.
        log: takes one line for each bad step, with its rows.
        metrics: takes one line for each bad step and each jump.
        progress: is told.
        totals: holds what survives an interruption.
    """

    def __init__(self, limit: int, *, log: JsonLines, metrics: JsonLines, progress: Progress, totals: Totals) -> None:
        self.limit = limit
        self.log, self.metrics, self.progress, self.totals = log, metrics, progress, totals
        self.in_a_row = 0
        self.latest = ""
        """What was wrong with the latest one."""

    @property
    def exhausted(self) -> bool:
        """Whether the run must stop."""
        return self.in_a_row >= self.limit

    def diverged(self, step: int, saved: str) -> Diverged:
        """The error of a run that too many bad steps ended.

        Args:
            step: the latest of them.
            saved: where the state before them is.
        """
        steps = f"the last {self.in_a_row} steps were" if self.in_a_row > 1 else "the last step was"
        return Diverged(
            f"{steps} left out because loss or gradient is no number ({self.latest} at step {step}); {saved}",
            where=str(self.log.path),
            fix="look at the rows named there, or go on with a lower optimizer.learning_rate or with "
            "model.compute_dtype=float32 (resume=auto resume.allow_changes=true)",
        )

    def skip(self, step: int, loss: float, grad_norm: float, rows: list[str]) -> None:
        """Take in a step that was left out.

        Args:
            step: its number, from 1.
            loss: mean loss of its rows.
            grad_norm: norm of its gradient.
            rows: where its rows come from, over all processes.
        """
        self.in_a_row += 1
        self.totals.skipped_steps += 1
        self.latest = f"loss {loss:.4g}" if not math.isfinite(loss) else f"gradient norm {grad_norm:.4g}"
        self.log.write({"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows})
        message = f"warning: step {step} is left out: {self.latest}; its rows stand in {self.log.path.name}"
        self.metrics.write({"event": "warning", "step": step, "message": message})
        self.progress.message(message)

    def take(self, step: int, loss: float) -> None:
        """Take in a good step, and report it if its loss jumped."""
        self.in_a_row = 0
        usual = jumped(self.totals.recent_losses, loss)
        self.totals.remember(loss)
        if usual is None:
            return
        self.totals.loss_spikes += 1
        message = f"warning: step {step}: the loss jumped to {loss:.4g}, usual is {usual:.4g}"
        self.metrics.write({"event": "warning", "step": step, "message": message})
        if self.totals.loss_spikes <= TOLD:
            last = "; further ones are logged only" if self.totals.loss_spikes == TOLD else ""
            self.progress.message(message + last)


def jumped(recent: list[float], loss: float) -> float | None:
    """The usual loss, if ``loss`` is far above it; None if it is not, or nothing is usual yet."""
    if len(recent) < NEEDED:
        return None
    usual = median(recent)
    # 1.4826: from the median deviation to the standard deviation of normal numbers.
    spread = 1.4826 * median(abs(other - usual) for other in recent)
    return usual if loss > usual + max(SPREADS * spread, SHARE * abs(usual)) else None
