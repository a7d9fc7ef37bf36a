"""One export under way: what is asked for, what is loaded, what is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qmemtune.config.schema import Config
from qmemtune.data.prepare import prepare_data
from qmemtune.data.prepared import PreparedData
from qmemtune.engine.progress import Progress
from qmemtune.engine.restore import LoadedRun, load_run
from qmemtune.evaluation.samples import evenly_spaced
from qmemtune.export.exactness import folds
from qmemtune.models.loading import load_tokenizer
from qmemtune.models.sources import Source
from qmemtune.rundir import RunDir

CANDIDATES_PER_ROW = 32
"""Training rows read for each calibration row, so that the calibration rows are spread over the data."""


@dataclass
class Export:
    """One export under way."""

    run: RunDir
    config: Config
    progress: Progress
    source: Source
    """The base model's."""
    result: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    _live: LoadedRun | None = None

    @property
    def form(self) -> str:
        return self.config.export.format

    @property
    def folds(self) -> bool:
        """Whether routing has to be replaced by static updates."""
        return folds(self.config)

    @property
    def live(self) -> LoadedRun:
        """The live model; loaded when first asked for, since large models are merged without it."""
        if self._live is None:
            self._live = load_run(self.run, self.config)
        return self._live

    def tokenizer(self) -> Any:
        """The run's tokenizer."""
        return self._live.tokenizer if self._live is not None else load_tokenizer(self.config.model)


def calibration_rows(job: Export) -> Sequence[Any]:
    """Calibration rows to fold on, and to compare bases on; none if nothing needs any.

    Raises:
        UserError: the data cannot be read.
    """
    export = job.config.export
    compares = job.form == "merged" and job.config.quantization.kind != "none" and export.base == "auto"
    if not (job.folds or (compares and export.fidelity)):
        return []
    return calibration_data(job, export.calibration_rows).train


def calibration_data(job: Export, wanted: int) -> PreparedData:
    """Rows spread over the run's training rows, or over those of ``export.calibration``; all in ``train``.

    Raises:
        UserError: the data cannot be read.
    """
    data = job.config.data
    if job.config.export.calibration is not None:
        data = replace(
            data,
            path=job.config.export.calibration,
            sources={},
            eval_path=None,
            eval_split=None,
            eval_fraction=0.0,
            max_train_rows=None,
        )
    most = wanted * CANDIDATES_PER_ROW
    limit = most if data.max_train_rows is None else min(most, data.max_train_rows)
    prepared = prepare_data(replace(data, max_train_rows=limit), job.live.tokenizer)
    count = len(prepared.train)
    return replace(prepared, train=prepared.train.select(evenly_spaced(range(count), wanted)))
