"""Forms routes: a block's query, its logits over the atoms, the instruction prior, the routed operator.

Tensor letters: B batch, T tokens, D input width, R rank, M atoms, K key width, N blocks, E instruction embedding.
``...`` are the leading dimensions of a layer's input: (B, T) in a language model, (B,) in an MLP.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qmemtune.adapters.queryable.centering import centered
from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.adapters.queryable.context import AdapterPass, ForwardContext
from qmemtune.adapters.queryable.devices import float32, no_autocast
from qmemtune.adapters.queryable.fixed import Kept, once
from qmemtune.adapters.queryable.prior import divergence_from_prior, log_prior, rows_of
from qmemtune.adapters.queryable.routing import (
    QUERY_EPS,
    attend,
    normed_state,
    own_atoms,
    rms_norm,
    routed_operator,
    stack_states,
    top_k_softmax,
)
from qmemtune.errors import UserError

if TYPE_CHECKING:
    from qmemtune.adapters.queryable.memory import QueryableMemory


def form_route(
    memory: QueryableMemory,
    name: str,
    block: int,
    x: Tensor,
    z: Tensor,
    factor: Tensor,
    context: ForwardContext,
    state: AdapterPass,
) -> Tensor:
    """Form the route of a block and the routed operator of its tokens.

    Args:
        memory: the model's.
        name: adapter.
        block: index of the block.
        x: input of the block's first layer, (..., D).
        z: its low-rank state, (..., R), any float type; routing computes in float32.
        factor: the A that made it, (R, D).

    Returns:
        ``C = I + sum_m w_m Delta_m``, (..., R, R), float32.
    """
    config = memory.configs[name]
    recording = not memory.holder.recomputing
    made = MadeOfWeights(memory, name, z, state)
    with no_autocast(z.device):
        normed = pooled(config, query_state(made, block, x, factor, context), context)
        query = F.linear(normed, *made.query(block))
        if name in memory.queryable_summary:
            # Recomputation meets the states of later blocks too; a route reads those that ran before it.
            count = state.earlier.setdefault(block, len(state.states))
            if count:
                query = query + attend(query, earlier_states(state, count, query))
        if config.router_norm:
            query = rms_norm(query, QUERY_EPS)
        logits = F.linear(query, made.key())
        if not config.shared_atoms:
            logits = own_atoms(logits, block, memory.num_blocks(name), 0.0 if config.generated_core else float("-inf"))
        if config.has_prior:
            # Once a block, though the same for all: so recomputation of any one layer meets the same tensors.
            prior = made.in_this_pass("prior", lambda: instruction_prior(memory, name, z, context))
            if config.has_prior_kl:
                divergence = divergence_from_prior(logits, prior, context.token_mask)
                if recording:
                    state.divergences.append(divergence)
            logits = logits + config.current_prior * prior
        weights = F.silu(logits) if config.generated_core else top_k_softmax(logits, config.top_k)
        routed = routed_operator(weights, made.cores())
        if config.granularity == "row":
            weights, routed = weights.expand(*z.shape[:-1], -1), routed.expand(*z.shape[:-1], -1, -1)
        summary = None
        if name in memory.queryable_summary and block < memory.num_blocks(name) - 1:
            normed = pooled(config, normed_state(z.float(), routed), context)
            summary = F.linear(normed, made.summary())
    if recording:
        state.routed[block] = routed
        if summary is not None:
            state.states.append(summary)
        if memory.observer is not None:
            memory.observer(name, block, weights.detach(), context.token_mask)
    return routed


class MadeOfWeights:
    """What routes need of an adapter's weights, float32 on the device of ``z``.

    Without gradients it is made once a pass, or once for as long as weights are fixed. With them it is made for each
    block, so that the recomputation of any one layer meets the same tensors.
    """

    def __init__(self, memory: QueryableMemory, name: str, z: Tensor, state: AdapterPass) -> None:
        self.memory, self.name, self.z = memory, name, z
        self.of_pass: Kept | None = None
        self.kept: Kept | None = None
        if not torch.is_grad_enabled():
            self.of_pass, fixed = state.kept, memory.holder.kept
            self.kept = self.of_pass if fixed is None else fixed

    def _once(self, kept: Kept | None, key: tuple[str | int, ...], make: Callable[[], Tensor]) -> Tensor:
        return make() if kept is None else once(kept, (self.name, *key, self.z.device), make)

    def in_this_pass(self, what: str, make: Callable[[], Tensor]) -> Tensor:
        """What is the same for all blocks of a pass."""
        return self._once(self.of_pass, (what,), make)

    def query(self, block: int) -> tuple[Tensor, Tensor]:
        """A block's query projection (K, R) and offset (K,)."""
        projection, offset = self.memory.queryable_query[self.name], self.memory.queryable_block[self.name]
        return (
            self._once(self.kept, ("query", block), lambda: float32(projection[block], self.z)),
            self._once(self.kept, ("offset", block), lambda: float32(offset[block], self.z)),
        )

    def key(self) -> Tensor:
        """The atoms' keys as they meet a query, (M, K)."""
        return self._once(self.kept, ("key",), self._key)

    def _key(self) -> Tensor:
        config, key = self.memory.configs[self.name], float32(self.memory.queryable_key[self.name], self.z)
        return (rms_norm(key) if config.router_norm else key) * (config.temperature / math.sqrt(config.key_dim))

    def cores(self) -> Tensor:
        """The cores as they act, (M, R, R)."""
        return self._once(self.kept, ("cores",), lambda: self.memory.cores(self.name, self.z))

    def summary(self) -> Tensor:
        """The depth summary's projection, (K, R)."""
        return self._once(self.kept, ("summary",), lambda: float32(self.memory.queryable_summary[self.name], self.z))

    def mean_state(self, block: int, width: int, factor: Tensor) -> Tensor:
        """``A mean`` of a block's first layer, (R,)."""
        means = self.memory.queryable_input[self.name]

        def make() -> Tensor:
            return F.linear(float32(means.of(block, width), self.z), float32(factor, self.z))

        return self._once(self.kept, ("mean", block), make)


def earlier_states(state: AdapterPass, count: int, query: Tensor) -> Tensor:
    """The states of the first ``count`` blocks, (..., J, K)."""
    if torch.is_grad_enabled():
        return stack_states(state.states[:count], query)
    stacked = state.stacked
    if stacked is None or stacked.shape[:-2] != query.shape[:-1] or stacked.device != query.device:
        stacked = stack_states(state.states[:count], query)
    elif stacked.shape[-2] < count:
        stacked = torch.cat([stacked, stack_states(state.states[stacked.shape[-2] : count], query)], dim=-2)
    state.stacked = stacked
    return stacked[..., :count, :]


def query_state(made: MadeOfWeights, block: int, x: Tensor, factor: Tensor, context: ForwardContext) -> Tensor:
    """What a block's query reads, (..., R): its low-rank state, less that of the mean input, of unit mean square."""
    memory, z = made.memory, made.z.float()
    if not memory.configs[made.name].center_queries:
        return rms_norm(z)
    if memory.training and torch.is_grad_enabled() and not memory.holder.recomputing:
        memory.queryable_input[made.name].measure(block, x, context.token_mask)
    return centered(z, made.mean_state(block, x.shape[-1], factor))


def pooled(config: QueryableMemoryConfig, states: Tensor, context: ForwardContext) -> Tensor:
    """States (B, T, R) as they are, or their mean over each row's prompt, (B, 1, R)."""
    if config.granularity == "token":
        return states
    prompt = context.prompt_mask
    if prompt is None or prompt.shape != states.shape[:-1]:
        raise UserError(
            "this memory forms one route a row, from its prompt, and only the loss of rows tells what is prompt",
            where="adapter.granularity",
            fix="train with adapter.granularity=token to generate, export, or use it elsewhere",
        )
    share = prompt.to(states) / prompt.sum(dim=-1, keepdim=True).clamp_min(1)
    return (share.unsqueeze(-2) @ states).contiguous()


def instruction_prior(memory: QueryableMemory, name: str, z: Tensor, context: ForwardContext) -> Tensor:
    """``log p(m | u)`` for the tokens of ``z`` (B, ..., R); zeros, hence no effect, without instruction.

    Returns:
        (B, 1..., M), one for each row; of packed rows one for each token, (B, ..., M).
    """
    given = context.instruction
    projection = float32(memory.queryable_prior_projection[name], z)
    key = float32(memory.queryable_prior_key[name], z)
    given = given.get(name) if isinstance(given, Mapping) else given
    if given is None:
        if memory.training and not memory.warned_prior:
            memory.warned_prior = True
            warnings.warn(
                "the instruction prior has no effect in this training: no instruction reaches the adapter",
                stacklevel=2,
            )
        given = projection.new_zeros(1, projection.shape[1])
    given, temperature = given.to(projection), memory.configs[name].current_prior_temperature
    if context.instruction_rows is not None:
        prior = log_prior(given, projection, key, temperature)
        return prior[context.instruction_rows.to(prior.device)].view(*z.shape[:-1], -1)
    prior = log_prior(rows_of(given, z.shape[0]), projection, key, temperature)
    return prior.view(prior.shape[0], *[1] * (z.dim() - 2), prior.shape[-1])
