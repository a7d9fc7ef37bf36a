"""The memory shared by all adapted layers of a model: atoms, router weights, and what one forward pass is told.

Tensor letters: B batch, T tokens, D model width, R rank, M atoms, K key width, N blocks, E instruction embedding.
``...`` are the leading dimensions of a layer's input: (B, T) in a language model, (B,) in an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qmemtune.adapters.queryable.centering import InputMeans
from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.adapters.queryable.context import BoundCheckpoint, ContextHolder
from qmemtune.adapters.queryable.devices import float32

RouteObserver = Callable[[str, int, Tensor, Tensor | None], None]
"""Called with adapter, block, route (..., M) and token mask (B, T) each time a route is formed."""

MEMORY_NAME = "adapter_memory"
"""Attribute of the base model under which the memory lives."""

PER_ADAPTER = ("queryable_core", "queryable_key", "queryable_query", "queryable_block")
SUMMARY = "queryable_summary"
INPUT = "queryable_input"
PRIOR = ("queryable_prior_projection", "queryable_prior_key")


class QueryableMemory(nn.Module, BaseTunerLayer):
    """Atoms and router of every adapter of one model, stored once.

    The memory is a tuner layer of its own on the root of the base model. So PEFT's operations on tuner layers
    (switching, freezing, deleting, casting, saving, loading) reach it like any other layer. Parameters are looked up
    by attribute at run time, never kept by reference, because wrappers such as FSDP replace them.

    Shapes, each in a dictionary by adapter name: core (M, R, R); key (M, K); query (N, K, R), one query projection a
    block; block (N, K), one offset a block; summary (K, R), absent without depth summary; prior_projection (K, E) and
    prior_key (M, K), absent without instruction prior; with ``center_queries`` input holds the blocks' mean inputs.
    """

    adapter_layer_names = (*PER_ADAPTER, SUMMARY, *PRIOR)
    other_param_names = (INPUT,)

    def __init__(self) -> None:
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.queryable_input = nn.ModuleDict()
        self.configs: dict[str, QueryableMemoryConfig] = {}
        self.holder = ContextHolder()
        self.observer: RouteObserver | None = None
        self.instruction: Tensor | Mapping[str, Tensor] | None = None
        self.instruction_rows: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.divergence: dict[str, Tensor] = {}
        self._checkpointed: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        self._anchor: tuple[nn.Module, ...] = ()
        self.warned_prior = False
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    # --- construction -------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: QueryableMemoryConfig) -> None:
        """Create an adapter's atoms; blocks are added as layers are adapted."""
        m, r, k = config.num_atoms, config.r, config.key_dim
        self.configs[name] = config
        self.queryable_core[name] = nn.Parameter(torch.randn(m, r, r) * config.init_core_std)
        self.queryable_key[name] = nn.Parameter(torch.randn(m, k))
        self.queryable_query[name] = nn.Parameter(torch.empty(0, k, r))
        self.queryable_block[name] = nn.Parameter(torch.empty(0, k))
        if config.center_queries:
            self.queryable_input[name] = InputMeans()
        if config.has_prior:
            assert config.prior_dim is not None, "the tuner fills prior_dim before the memory is made"
            e = config.prior_dim
            self.queryable_prior_projection[name] = nn.Parameter(torch.randn(k, e))
            self.queryable_prior_key[name] = nn.Parameter(torch.randn(m, k) * 0.1)

    def add_block(self, name: str, input_width: int) -> None:
        """Add one block's query projection, and from the second block on the depth summary's projection.

        Args:
            input_width: input features of the block's first layer.
        """
        config = self.configs[name]
        k, r = config.key_dim, config.r
        query, block = self.queryable_query[name], self.queryable_block[name]
        new_query = torch.randn(1, k, r, device=query.device) / math.sqrt(r)
        self.queryable_query[name] = nn.Parameter(torch.cat([query.data, new_query]))
        self.queryable_block[name] = nn.Parameter(torch.cat([block.data, torch.zeros(1, k, device=block.device)]))
        if config.center_queries:
            self.queryable_input[name].add_block(len(block.data), input_width)
        # A single block has nothing to summarise; an unused parameter would break data-parallel training.
        if config.depth_summary and len(self.queryable_block[name]) == 2:
            self.queryable_summary[name] = nn.Parameter(torch.randn(k, r) / math.sqrt(r))

    def num_blocks(self, name: str) -> int:
        """Blocks of an adapter."""
        return len(self.queryable_block[name])

    def attach(self, entries: list[nn.Module], checkpointed: list[nn.Module]) -> None:
        """Open a context whenever one of ``entries`` is entered from outside, and close it behind.

        Args:
            entries: modules through which a forward pass may enter (the model, its decoder).
            checkpointed: modules with transformers' ``gradient_checkpointing`` switch.
        """
        for entry in entries:
            self._hooks.append(entry.register_forward_pre_hook(self._open, with_kwargs=True))
            self._hooks.append(entry.register_forward_hook(self._close, always_call=True))
        self._checkpointed = checkpointed

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._checkpointed:
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(function, BoundCheckpoint):
                layer._gradient_checkpointing_func = function.function

    # --- one forward pass ---------------------------------------------------------------------------------------

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel copies the layers but not the memory they share: "
                "use one process a GPU (torchrun or accelerate launch), or a single GPU"
            )
        holder = self.holder
        mask = kwargs.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = None
        if not holder.enter(module, mask, self.instruction, self.instruction_rows, self.prompt_mask):
            return
        self.divergence = {}
        for layer in self._checkpointed:
            if layer.gradient_checkpointing and layer.training:
                function = layer._gradient_checkpointing_func
                if not (isinstance(function, BoundCheckpoint) and function.holder is holder):
                    layer._gradient_checkpointing_func = BoundCheckpoint(function, holder)

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        context = self.holder.leave(module)
        for name, state in context.passes.items() if context else ():
            if state.divergences:
                device = state.divergences[0].device
                self.divergence[name] = torch.stack([value.to(device) for value in state.divergences]).mean()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself: an ``nn.Sequential`` calls all its submodules, this one too."""
        return x

    # --- routing ------------------------------------------------------------------------------------------------

    def cores(self, name: str, like: Tensor) -> Tensor:
        """The cores as they act, (M, R, R), float32 on the device of ``like``: without their mean, if so configured.

        What all atoms have in common the factors of each layer can do themselves; in the cores, which all layers
        share, it would scale every layer's update at once, at the memory's own learning rate.
        """
        config, core = self.configs[name], float32(self.queryable_core[name], like)
        if not config.center_cores or config.generated_core:
            return core
        groups = 1 if config.shared_atoms else self.num_blocks(name)
        grouped = core.unflatten(0, (groups, -1))
        return (grouped - grouped.mean(dim=1, keepdim=True)).flatten(0, 1)

    @contextmanager
    def prompted(self, prompt_mask: Tensor) -> Iterator[None]:
        """Tell the forward passes inside which tokens are prompts, (B, T)."""
        saved, self.prompt_mask = self.prompt_mask, prompt_mask
        try:
            yield
        finally:
            self.prompt_mask = saved

    # --- instruction prior --------------------------------------------------------------------------------------

    @contextmanager
    def instructed(self, embeddings: Tensor | Mapping[str, Tensor], rows: Tensor | None = None) -> Iterator[None]:
        """Give the rows of the forward passes inside their instructions.

        Args:
            embeddings: unit-norm instruction embeddings, (B, E); a row of zeros is a row without instruction. Where
                adapters have different encoders, one such tensor an adapter.
            rows: of packed rows, which of the embeddings each token has, (B, T).
        """
        saved = self.instruction, self.instruction_rows
        self.instruction, self.instruction_rows = embeddings, rows
        try:
            yield
        finally:
            self.instruction, self.instruction_rows = saved

    # --- PEFT ---------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """None: other tuner layers have their base layer's, which PEFT would look for without end."""
        raise AttributeError("a queryable memory has no base layer")

    @property
    def bias(self) -> Tensor:
        """None, as :attr:`weight`."""
        raise AttributeError("a queryable memory has no base layer")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's atoms and router."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self.divergence.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see :meth:`QueryableMemoryModel.merge_and_unload`."""
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if device is None and self._anchor:
            device = self._anchor[0].weight.device
        if device is None or device.type == "meta":
            return
        for attribute in self.adapter_layer_names:
            values = getattr(self, attribute)
            if adapter_name in values and values[adapter_name].device.type != "meta":
                values[adapter_name] = nn.Parameter(
                    values[adapter_name].data.to(device), requires_grad=values[adapter_name].requires_grad
                )
        if adapter_name in self.queryable_input:
            means = self.queryable_input[adapter_name]
            if not any(mean.is_meta for mean in means.buffers()):
                means.to(device)


NOT_MERGEABLE = (
    "a queryable memory depends on its input and cannot be merged into fixed weights exactly; "
    "`qmemtune merge-export` folds it into static ones and measures how far they are from the live model"
)


def memory_of(model: nn.Module) -> QueryableMemory | None:
    """The memory of a model, whatever wraps it; None if it has none."""
    for module in model.modules():
        if isinstance(module, QueryableMemory):
            return module
    return None


def has_means(model: nn.Module) -> bool:
    """Whether the first training passes of a model measure the inputs of a memory's blocks."""
    memory = memory_of(model)
    return memory is not None and len(memory.queryable_input) > 0
