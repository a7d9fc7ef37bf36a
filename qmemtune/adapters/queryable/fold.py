"""Folding: one static operator a layer in place of routing, which makes the adapter a plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.adapters.queryable.memory import memory_of
from qmemtune.adapters.queryable.statistics import RouteStatistics, active_adapter


@dataclass(frozen=True)
class FoldedLayer:
    """A static stand-in for one adapted layer: ``W x + scaling * B (A x)``."""

    lora_A: Tensor
    """``C A`` with the folded operator C, (R, in_features), float32."""
    lora_B: Tensor
    """(out_features, R), float32."""
    scaling: float
    """``alpha / r``."""


def mean_routes(model: nn.Module, forwards: Iterable[Callable[[], object]]) -> dict[int, Tensor]:
    """Mean route of each block over all real tokens of some forward passes.

    Args:
        model: a model whose active adapter is a queryable memory.
        forwards: calls that each run the model forward once on calibration rows.

    Returns:
        block -> mean weights over atoms, (M,), float64; they sum to one.

    Raises:
        ValueError: the model has no memory, or no token passed.
    """
    memory = memory_of(model)
    if memory is None:
        raise ValueError("the model has no queryable memory")
    statistics = RouteStatistics(active_adapter(memory), torch.float64)
    memory.observer = statistics
    try:
        with torch.no_grad():
            for forward in forwards:
                forward()
    finally:
        memory.observer = None
    use = statistics.use(statistics.table(torch.device("cpu"))) if statistics.observed else None
    if use is None or not use.tokens:
        raise ValueError("no calibration token passed through the memory")
    return {block: torch.tensor(weights, dtype=torch.float64) for block, weights in enumerate(use.use)}


def mean_fold(model: nn.Module, forwards: Iterable[Callable[[], object]]) -> dict[str, FoldedLayer]:
    """Fold the active adapter with each block's mean route, ``C = I + sum_m mean(w_m) Delta_m``.

    Returns:
        path of each adapted layer in the base model -> its static factors.
    """
    memory = memory_of(model)
    routes = mean_routes(model, forwards)
    assert memory is not None
    folded: dict[str, FoldedLayer] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, QueryableLinear):
            continue
        for name in layer.active_adapters:
            if name not in layer.queryable_A:
                continue
            core = memory.queryable_core[name].detach().float()
            route = routes[layer.block[name]].to(core)
            operator = torch.eye(core.shape[-1], device=core.device) + (route @ core.flatten(1)).view(core.shape[1:])
            folded[path.removeprefix("base_model.model.")] = FoldedLayer(
                lora_A=operator @ layer.queryable_A[name].weight.detach().float(),
                lora_B=layer.queryable_B[name].weight.detach().float(),
                scaling=layer.scaling[name],
            )
    return folded
