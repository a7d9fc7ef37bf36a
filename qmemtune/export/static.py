"""Replace a queryable memory's routing by static factors, one pair a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qmemtune.adapters.queryable.fold import FoldedLayer, least_squares_fold, mean_fold
from qmemtune.data.collate import Collator
from qmemtune.engine.restore import LoadedRun
from qmemtune.evaluation.forward import evaluation_forward
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import length_batches, to_device
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast

BATCH_SIZE = 16


def folded_layers(live: LoadedRun, rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, FoldedLayer]:
    """Fold the run's memory over the real tokens of ``rows``.

    Args:
        rows: calibration rows, as the data module prepares them; their instructions reach the memory's prior.
        method: ``mean`` for each block's mean route, else the least-squares operator of each layer.

    Returns:
        path of each adapted layer in the base model -> its static factors.
    """
    fold = mean_fold if method == "mean" else least_squares_fold
    with undisturbed(live.model), dequantized_on_cpu(live.model):
        return fold(live.model, _forwards(live, rows))


def _forwards(live: LoadedRun, rows: Sequence[Mapping[str, Any]]) -> Iterator[Callable[[], object]]:
    # Routes need no logits; but the adapter's context belongs to the whole model's forward, so ask for few of them.
    accepted = inspect.signature(live.model.get_base_model().forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    collate = Collator(live.tokenizer.pad_token_id)
    for indices in length_batches([len(row["input_ids"]) for row in rows], BATCH_SIZE):
        batch = to_device(collate([dict(rows[i]) for i in indices]), live.device)
        yield partial(_forward, live, batch, options)


def _forward(live: LoadedRun, batch: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    with evaluation_forward(batch["instruction"], live.source, partial(autocast, live.device, live.dtype)):
        live.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options)
