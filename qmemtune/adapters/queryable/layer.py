"""A linear layer with low-rank factors whose bottleneck passes through the routed operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qmemtune.adapters.queryable.apply import add_update, add_update_without_gradient
from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.adapters.queryable.memory import NOT_MERGEABLE, QueryableMemory
from qmemtune.adapters.queryable.router import form_route

NOT_MIXABLE = "a queryable memory cannot mix adapters within a batch (adapter_names): use set_adapter"


class QueryableLinear(nn.Module, BaseTunerLayer):
    """``y = W x + (alpha / r) * B (z + sum_m w_m Delta_m z)`` with ``z = A x``.

    One class serves every base layer: ``nn.Linear``, transformers' ``Conv1D``, bitsandbytes 4-bit and 8-bit. The base
    layer computes its own product; the memory is shared and lives on the model's root.

    Shapes: A (R, in_features), B (out_features, R); input (..., in_features), output (..., out_features).
    """

    adapter_layer_names = ("queryable_A", "queryable_B")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, memory: QueryableMemory) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In a tuple, so that the shared memory is no submodule of each layer; a deep copy still copies both together.
        self._memory = (memory,)
        self.queryable_A = nn.ModuleDict()
        self.queryable_B = nn.ModuleDict()
        self.dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.block: dict[str, int] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = base.weight.shape
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def memory(self) -> QueryableMemory:
        """The memory shared with the other layers."""
        return self._memory[0]

    def update_layer(self, adapter_name: str, config: QueryableMemoryConfig, block: int) -> None:
        """Add an adapter to this layer.

        Args:
            block: index of the block whose route this layer uses.
        """
        self.queryable_A[adapter_name] = nn.Linear(self.in_features, config.r, bias=False)
        self.queryable_B[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
        self.reset_parameters(adapter_name)
        self.dropout[adapter_name] = config.dropout
        self.scaling[adapter_name] = config.scaling
        self.block[adapter_name] = block
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def reset_parameters(self, adapter_name: str) -> None:
        """LoRA's initialisation: A as a linear layer's weights, B zero."""
        weight_a, weight_b = self.queryable_A[adapter_name].weight, self.queryable_B[adapter_name].weight
        if weight_a.device.type != "meta":
            nn.init.kaiming_uniform_(weight_a, a=math.sqrt(5))
            nn.init.zeros_(weight_b)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        for values in (self.dropout, self.scaling, self.block):
            values.pop(adapter_name, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class.

        Raises:
            ValueError: ``adapter_names`` is given (a batch that mixes adapters).
            RuntimeError: the layer sees other tokens than the layer that formed its block's route.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(NOT_MIXABLE)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.queryable_A:
                result = self.updated(result, name, x)
        return result

    def updated(self, result: Tensor, name: str, x: Tensor) -> Tensor:
        """``result`` with the adapter's part, (..., out_features); ``result`` itself may be changed.

        Args:
            result: output of the base layer for ``x``.
        """
        weight_a, weight_b = self.queryable_A[name].weight, self.queryable_B[name].weight
        dropout = self.dropout[name]
        kept = F.dropout(x, dropout) if dropout and self.training else x
        z = F.linear(kept if x.dtype == weight_a.dtype else self._cast_input_dtype(kept, weight_a.dtype), weight_a)
        routed = self.routed(name, x, z)
        if torch.is_grad_enabled():
            return add_update(result, z, routed, weight_b, self.scaling[name])
        return add_update_without_gradient(result, z, routed, weight_b, self.scaling[name])

    def routed(self, name: str, x: Tensor, z: Tensor) -> Tensor:
        """The routed operator of this layer's block, formed here if this layer runs first, (..., R, R).

        Args:
            x: input of the layer, (..., in_features).
            z: its low-rank state, (..., R).
        """
        memory, block = self.memory, self.block[name]
        state = memory.holder.pass_of(name)
        context = memory.holder.current
        assert context is not None
        owner = state.owners.setdefault(block, id(self))
        # When a checkpointed layer is computed again, autograd expects the same tensors to be saved in the same order:
        # the layer that formed the route forms it again, the others take the one of their forward pass.
        if block not in state.routed or (memory.holder.recomputing and owner == id(self)):
            routed = form_route(memory, name, block, x, z, self.queryable_A[name].weight, context, state)
        else:
            routed = state.routed[block]
            if routed.device != z.device:
                # A model may be spread over several devices, and a block may lie across the border of two.
                routed = routed.to(z.device)
        if z.dtype != routed.dtype and not torch.is_grad_enabled():
            # Without a backward pass the product may run in the type of its input, which saves two casts a layer.
            cast = state.cast.get(block)
            if cast is None or cast.dtype != z.dtype or cast.device != z.device:
                cast = state.cast[block] = routed.to(z.dtype)
            routed = cast
        if routed.shape[:-2] == z.shape[:-1]:
            return routed
        if 2 in (z.dim(), routed.dim() - 1) and routed.shape[:-2].numel() == z.shape[:-1].numel():
            # Some layers flatten batch and tokens (a mixture's gate): the tokens and their order are the same.
            return routed.reshape(*z.shape[:-1], *routed.shape[-2:])
        raise RuntimeError(
            f"a layer of {self.in_features} inputs sees tokens of shape {tuple(z.shape[:-1])}, but its block's route "
            f"was formed for {tuple(routed.shape[:-2])}: leave it out with exclude_modules"
        )

    def formed_route(self, name: str) -> Tensor | None:
        """What :meth:`routed` returns where nothing has to be done for it in a pass with gradients; otherwise None."""
        holder, block = self.memory.holder, self.block[name]
        state = holder.pass_of(name)
        if holder.recomputing and state.owners.get(block) == id(self):
            return None
        return state.routed.get(block)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the operator depends on the input."""
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def __repr__(self) -> str:
        return "queryable." + super().__repr__()


def supported(module: nn.Module) -> bool:
    """Whether a module is a linear layer this adapter can wrap."""
    return isinstance(module, (nn.Linear, Conv1D))
