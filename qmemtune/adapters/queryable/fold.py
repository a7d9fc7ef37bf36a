"""Folding: one static operator a layer in place of routing, which makes the adapter a plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmemtune.adapters.queryable.apply import routed_product
from qmemtune.adapters.queryable.devices import no_autocast
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
        block -> mean weights over atoms, (M,), float64; they sum to one. Blocks that no token reached are left out.

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
    return {block: torch.tensor(use.use[block], dtype=torch.float64) for block in use.seen}


def mean_fold(model: nn.Module, forwards: Iterable[Callable[[], object]]) -> dict[str, FoldedLayer]:
    """Fold the active adapter with each block's mean route, ``C = I + sum_m mean(w_m) Delta_m``.

    Returns:
        path of each adapted layer in the base model -> its static factors.
    """
    memory = memory_of(model)
    routes = mean_routes(model, forwards)
    assert memory is not None
    operators = {}
    for path, layer, name in adapted_layers(model):
        core = memory.cores(name, memory.queryable_core[name]).detach()
        operators[path] = torch.eye(core.shape[-1], device=core.device)
        route = routes.get(layer.block[name])
        # Where no token came by there is no route to fold: plain LoRA is left.
        if route is not None:
            operators[path] += (route.to(core) @ core.flatten(1)).view(core.shape[1:])
    return folded(model, operators)


def least_squares_fold(
    model: nn.Module, forwards: Iterable[Callable[[], object]], *, ridge: float = 1e-4
) -> dict[str, FoldedLayer]:
    """Fold the active adapter with each layer's best static operator, ``C = E[C(x) z z^T] (E[z z^T] + eps)^-1``.

    It has the least ``E |C(x) z - C z|^2`` over all real tokens of the passes; two (R, R) sums a layer are kept.

    Args:
        forwards: calls that each run the model forward once on calibration rows.
        ridge: eps as a share of the mean squared state: directions that no calibration token has keep the identity.

    Returns:
        path of each adapted layer in the base model -> its static factors.

    Raises:
        ValueError: the model has no memory, or no token passed.
    """
    if memory_of(model) is None:
        raise ValueError("the model has no queryable memory")
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for path, layer, name in adapted_layers(model):
        rank = layer.queryable_A[name].weight.shape[0]
        moments[path] = (torch.zeros(rank, rank, dtype=torch.float64), torch.zeros(rank, rank, dtype=torch.float64))
        hooks.append(layer.register_forward_hook(partial(_add_moments, *moments[path], name)))
    try:
        with torch.no_grad():
            for forward in forwards:
                forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not any(states.any() for _, states in moments.values()):
        raise ValueError("no calibration token passed through the memory")
    operators = {}
    for path, (changes, states) in moments.items():
        identity = torch.eye(len(states), dtype=torch.float64)
        eps = ridge * states.trace() / len(states) + torch.finfo(torch.float64).tiny
        # Solved for the difference from the identity, which the ridge then pulls toward plain LoRA, not toward nothing.
        operators[path] = (identity + torch.linalg.solve(states + eps * identity, changes.T).T).float()
    return folded(model, operators)


def _add_moments(
    changes: Tensor, states: Tensor, name: str, layer: QueryableLinear, args: tuple[Tensor, ...], output: Tensor
) -> None:
    """Add ``(C(x) z - z) z^T`` and ``z z^T`` of one forward pass of a layer, over its real tokens."""
    if layer.disable_adapters or name not in layer.active_adapters:
        return
    with no_autocast(args[0].device):
        z = F.linear(args[0].float(), layer.queryable_A[name].weight.float())
        change = routed_product(layer.routed(name, args[0], z), z) - z
    context = layer.memory.holder.current
    mask = None if context is None else context.token_mask
    z, change = z.flatten(0, -2).double(), change.flatten(0, -2).double()
    if mask is not None and mask.numel() == len(z):
        keep = mask.flatten().bool()
        z, change = z[keep], change[keep]
    changes += (change.T @ z).cpu()
    states += (z.T @ z).cpu()


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, QueryableLinear, str]]:
    """Path in the base model, layer and active adapter of each adapted layer."""
    for path, layer in model.named_modules():
        if isinstance(layer, QueryableLinear):
            for name in layer.active_adapters:
                if name in layer.queryable_A:
                    yield path.removeprefix("base_model.model."), layer, name


def folded(model: nn.Module, operators: Mapping[str, Tensor]) -> dict[str, FoldedLayer]:
    """The adapter with a static operator (R, R) in each layer."""
    result = {}
    for path, layer, name in adapted_layers(model):
        factor = layer.queryable_A[name].weight.detach().float()
        result[path] = FoldedLayer(
            lora_A=operators[path].to(factor) @ factor,
            lora_B=layer.queryable_B[name].weight.detach().float(),
            scaling=layer.scaling[name],
        )
    return result


def resized(layer: FoldedLayer, rank: int, *, generator: torch.Generator) -> FoldedLayer:
    """The same update with another rank.

    A larger rank adds directions that do nothing yet (A random, B zero) but can be trained; a smaller one keeps the
    largest singular directions.
    """
    factor_a, factor_b = layer.lora_A.cpu(), layer.lora_B.cpu()
    own = len(factor_a)
    if rank > own:
        bound = factor_a.shape[1] ** -0.5
        extra = (torch.rand(rank - own, factor_a.shape[1], generator=generator) * 2 - 1) * bound
        padding = torch.zeros(len(factor_b), rank - own)
        return FoldedLayer(torch.cat([factor_a, extra]), torch.cat([factor_b, padding], dim=1), layer.scaling)
    if rank < own:
        q_b, r_b = torch.linalg.qr(factor_b)
        q_a, r_a = torch.linalg.qr(factor_a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        return FoldedLayer((q_a @ v[:rank].T * root).T.contiguous(), q_b @ u[:, :rank] * root, layer.scaling)
    return layer
