"""A look inside a queryable memory: which tokens, blocks and groups of rows use which atoms.

Tensor letters: B rows of a batch, T tokens, L rows in all, M atoms, N blocks, U distinct tokens, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qmemtune.adapters.queryable import QueryableLinear, QueryableMemory, memory_of
from qmemtune.adapters.queryable.blocks import layer_group
from qmemtune.adapters.queryable.statistics import RouteStatistics, active_adapter, atom_facts
from qmemtune.data.collate import Collator
from qmemtune.evaluation.association import by_instruction, clustering
from qmemtune.evaluation.evaluate import padding
from qmemtune.evaluation.forward import Autocast, Instructions, evaluation_forward
from qmemtune.evaluation.generate import takes
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.loss import length_batches, to_device
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast

SHARPEST = 12
"""Tokens with the sharpest routes that are reported."""


@dataclass
class Routes:
    """What was observed of L rows."""

    rows: Tensor
    """Mean route of each row over its real tokens, (L, N, M), float64."""
    tokens: Tensor
    """Sums of the routes of each distinct token, (U, N, M), float64."""
    entropy: Tensor
    """Sums of the entropies of each distinct token's routes, (U, N), nats."""
    counts: Tensor
    """Occurrences of each distinct token, (U,)."""
    ids: Tensor
    """The distinct tokens, (U,)."""
    statistics: RouteStatistics


def inspect_routes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    source: Instructions | None,
    has_prior: bool,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run a model over rows and report how its active adapter's memory is used. The model is left as it was.

    Args:
        model: a model whose active adapter is a queryable memory.
        rows: rows with ``input_ids``, ``labels``, ``instruction`` and ``group``.
        source: gives the rows' instructions to the adapter.
        has_prior: whether instructions have an effect, so that routes are observed without them too.
        device: where the model is; with ``dtype`` it decides on autocast.
        dtype: compute dtype.
        batch_size: rows in one forward pass.
        progress: told what is being observed, rows done and rows in all.

    Returns:
        ``rows``, ``tokens``, ``blocks``, ``atoms``, ``dead_atoms``, ``collapse`` (None for a healthy router),
        ``core_similarity``, ``key_similarity``, ``groups``, ``clustering`` (with and without the prior),
        ``instructions`` and ``sharpest_tokens``; see README.
    """
    memory = memory_of(model)
    assert memory is not None, "checked before the model is loaded"
    name = active_adapter(memory)
    cast = partial(autocast, device, dtype)

    def observed(what: str, given: Instructions | None) -> Routes:
        told = None if progress is None else partial(_tell, progress, what, len(rows))
        return observe(model, rows, padding(tokenizer), given, cast, device, batch_size, told)

    with undisturbed(model), dequantized_on_cpu(model):
        routes = observed("routes", source)
        bare = observed("routes without the prior", None) if has_prior else routes
    use = routes.statistics.use(routes.statistics.table(torch.device("cpu")))
    facts = atom_facts(memory, name)
    layers = layers_of_blocks(model, name)
    groups = [str(row.get("group") or "") for row in rows]
    mean_use = torch.tensor(use.use, dtype=torch.float64)[use.seen].mean(dim=0)
    report: dict[str, Any] = {
        "rows": len(rows),
        "tokens": use.tokens,
        "blocks": [
            {
                "block": block,
                "layers": layers.get(block, []),
                "entropy": use.entropy[block],
                "effective_atoms": use.effective_atoms[block],
                "use": use.use[block],
            }
            for block in use.seen
        ],
        "atoms": [
            {
                "atom": atom,
                "use": mean_use[atom].item(),
                "core_norm": facts.core_norm[atom],
                "key_norm": facts.key_norm[atom],
                **nearest(facts.core_similarity[atom], atom),
            }
            for atom in range(len(mean_use))
        ],
        "dead_atoms": use.dead_atoms,
        "collapse": use.collapse(memory.configs[name].top_k),
        "core_similarity": facts.core_similarity,
        "key_similarity": facts.key_similarity,
        "groups": by_group(routes, groups),
        "sharpest_tokens": sharpest_tokens(routes, tokenizer),
    }
    if len(set(groups)) > 1:
        kinds = {"with_prior": routes, "without_prior": bare} if has_prior else {"without_prior": routes}
        report["clustering"] = {kind: asdict(clustering(found.rows, groups)) for kind, found in kinds.items()}
        instructions = [str(row.get("instruction") or "") for row in rows]
        report["instructions"] = {
            kind: by_instruction(found.rows, groups, instructions) for kind, found in kinds.items()
        }
    return report


def _tell(progress: Callable[[str, int, int], None], what: str, total: int, done: int) -> None:
    progress(what, done, total)


def observe(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    source: Instructions | None,
    cast: Autocast,
    device: torch.device,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Routes:
    """One forward pass over every row, with the active adapter's routes summed up."""
    memory = memory_of(model)
    assert memory is not None
    name = active_adapter(memory)
    blocks, atoms = memory.num_blocks(name), memory.configs[name].num_atoms
    ids = torch.tensor(sorted({token for row in rows for token in row["input_ids"]}))
    routes = Routes(
        rows=torch.zeros(len(rows), blocks, atoms, dtype=torch.float64),
        tokens=torch.zeros(len(ids), blocks, atoms, dtype=torch.float64),
        entropy=torch.zeros(len(ids), blocks, dtype=torch.float64),
        counts=torch.zeros(len(ids), dtype=torch.float64),
        ids=ids,
        statistics=RouteStatistics(name),
    )
    collate, done = Collator(pad_token_id), 0
    options: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    for indices in length_batches([len(row["input_ids"]) for row in rows], batch_size):
        batch = collate([dict(rows[i]) for i in indices])
        with _BatchObserver(memory, routes, indices, batch["input_ids"], batch["attention_mask"].bool()):
            on_device = to_device(batch, device)
            with evaluation_forward(batch["instruction"], source, cast):
                model(
                    input_ids=on_device["input_ids"],
                    attention_mask=on_device["attention_mask"],
                    use_cache=False,
                    **options,
                )
        done += len(indices)
        if progress is not None:
            progress(done)
    return routes


class _BatchObserver:
    """Sums the routes of one batch into ``routes`` while open."""

    def __init__(
        self, memory: QueryableMemory, routes: Routes, indices: Sequence[int], ids_BT: Tensor, real_BT: Tensor
    ) -> None:
        self.memory, self.routes, self.indices, self.real = memory, routes, list(indices), real_BT
        self.where = torch.searchsorted(routes.ids, ids_BT[real_BT])
        routes.counts.index_add_(0, self.where, torch.ones(len(self.where), dtype=torch.float64))

    def __enter__(self) -> None:
        self.memory.observer = self._add

    def __exit__(self, *exc: object) -> None:
        self.memory.observer = None

    def _add(self, name: str, block: int, weights: Tensor, mask: Tensor | None) -> None:
        routes = self.routes
        routes.statistics(name, block, weights, mask)
        weights = weights.double().cpu()
        routes.rows[self.indices, block] = (weights * self.real[..., None]).sum(1) / self.real.sum(1, keepdim=True)
        flat = weights[self.real]
        routes.tokens[:, block].index_add_(0, self.where, flat)
        routes.entropy[:, block].index_add_(0, self.where, torch.special.entr(flat).sum(dim=-1))


def layers_of_blocks(model: nn.Module, name: str) -> dict[int, list[str]]:
    """Block -> the decoder layers that use its route, by number (in a plain MLP by name)."""
    found: dict[int, list[str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QueryableLinear) and name in layer.block:
            group = layer_group(path.removeprefix("base_model.model.")).rpartition(".")[2]
            layers = found.setdefault(layer.block[name], [])
            if group not in layers:
                layers.append(group)
    return found


def nearest(similarities: Sequence[float], atom: int) -> dict[str, Any]:
    """The other atom whose core is most alike, and the cosine; empty for a single atom."""
    others = [other for other in range(len(similarities)) if other != atom]
    if not others:
        return {}
    most = max(others, key=lambda other: similarities[other])
    return {"nearest_atom": most, "nearest_similarity": similarities[most]}


def by_group(routes: Routes, groups: Sequence[str]) -> dict[str, Any]:
    """Group -> its rows, the use of each atom by block (mean over rows), and its strongest atoms over all blocks."""
    found = {}
    for group in sorted(set(groups) - {""}):
        use = routes.rows[[i for i, other in enumerate(groups) if other == group]]
        over_blocks = use.mean(dim=(0, 1))
        found[group] = {
            "rows": len(use),
            "use": use.mean(dim=0).tolist(),
            "strongest_atoms": over_blocks.argsort(descending=True)[:3].tolist(),
        }
    return found


def sharpest_tokens(routes: Routes, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The tokens whose routes have the lowest mean entropy over blocks, and the block and atom where they are
    sharpest. Tokens that occur once are passed over where others are there."""
    scale = math.log(routes.tokens.shape[-1]) if routes.tokens.shape[-1] > 1 else 1.0
    seen = routes.tokens.abs().sum(dim=(0, 2)) > 0
    entropy = routes.entropy[:, seen] / routes.counts[:, None] / scale
    often = routes.counts > 1
    order = [i for i in entropy.mean(dim=1).argsort().tolist() if often[i] or not bool(often.any())]
    return [_sharp(routes, entropy[i].mean().item(), i, tokenizer) for i in order[:SHARPEST]]


def _sharp(routes: Routes, entropy: float, i: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    mean = routes.tokens[i] / routes.counts[i]
    block, atom = divmod(int(mean.argmax()), mean.shape[-1])
    return {
        "token": tokenizer.decode([int(routes.ids[i])]),
        "count": int(routes.counts[i]),
        "entropy": entropy,
        "block": block,
        "atom": atom,
        "weight": mean[block, atom].item(),
    }
