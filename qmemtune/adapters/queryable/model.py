"""The tuner: puts the memory on the model's root and adapted layers in place of linear ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from qmemtune.adapters.queryable.blocks import BlockPlan, refuse_unroutable
from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.adapters.queryable.fixed import fixed_weights
from qmemtune.adapters.queryable.layer import NOT_MIXABLE, QueryableLinear, supported
from qmemtune.adapters.queryable.memory import MEMORY_NAME, NOT_MERGEABLE, QueryableMemory
from qmemtune.adapters.queryable.packing import keep_unpacked


class QueryableMemoryModel(BaseTuner):
    """Adapts a model with a queryable memory; made by PEFT's ``get_peft_model`` from a ``QueryableMemoryConfig``.

    Raises:
        ValueError: a target is not a linear layer, or one in which per-token routes make no sense; a 4-bit weight of
            the base is packed for inference.
    """

    prefix = "queryable_"
    tuner_layer_cls = BaseTunerLayer
    """Both the adapted layers and the memory: what PEFT switches, freezes and deletes."""
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt ``model``; see :meth:`peft.tuners.tuners_utils.BaseTuner.inject_adapter`."""
        self._plan = BlockPlan(self.peft_config[adapter_name].block_size)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        memory = getattr(model, MEMORY_NAME)
        config, blocks = self.peft_config[adapter_name], memory.num_blocks(adapter_name)
        if not config.shared_atoms and (config.num_atoms % blocks or (config.top_k or 0) > config.num_atoms // blocks):
            raise ValueError(
                f"without shared_atoms each of the {blocks} blocks has an equal share of the atoms: num_atoms "
                f"{config.num_atoms} must be a multiple of {blocks}, and top_k at most the share"
            )
        memory._move_adapter_to_device_of_base_layer(adapter_name)

    def _prepare_model(self, peft_config: QueryableMemoryConfig, model: nn.Module) -> None:
        keep_unpacked(model)
        if peft_config.has_prior and peft_config.prior_dim is None:
            if not peft_config.uses_base_encoder or not hasattr(model, "get_input_embeddings"):
                raise ValueError("instruction_prior needs prior_dim, the width of the instruction embeddings")
            peft_config.prior_dim = model.get_input_embeddings().weight.shape[-1]

    def _create_and_replace(
        self,
        peft_config: QueryableMemoryConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, QueryableLinear) else target
        refuse_unroutable(current_key, base, self.model)
        if not supported(base):
            raise ValueError(
                f"{current_key} is a {type(base).__name__}, which a queryable memory cannot adapt: "
                "target linear layers (nn.Linear, Conv1D, bitsandbytes) only"
            )
        memory = self._memory()
        if adapter_name not in memory.configs:
            memory.add_adapter(adapter_name, peft_config)
        layer = target if isinstance(target, QueryableLinear) else QueryableLinear(target, memory)
        block = self._plan.block_of(current_key)
        while memory.num_blocks(adapter_name) < self._plan.num_blocks:
            memory.add_block(adapter_name, layer.in_features)
        layer.update_layer(adapter_name, peft_config, block)
        if layer is target:
            return
        if not memory._anchor:
            memory._anchor = (base,)
        self._replace_module(parent, target_name, layer, target)

    def _memory(self) -> QueryableMemory:
        """The model's memory, made when the first layer is adapted.

        Not before: PEFT takes a tuner layer that is there when it starts for a sign of an earlier adapter and would
        leave the base trainable.
        """
        if not hasattr(self.model, MEMORY_NAME):
            memory = QueryableMemory()
            setattr(self.model, MEMORY_NAME, memory)
            checkpointed = [m for m in self.model.modules() if hasattr(m, "gradient_checkpointing")]
            memory.attach(_entries(self.model), checkpointed)
        found: QueryableMemory = getattr(self.model, MEMORY_NAME)
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(NOT_MIXABLE)
        yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``. No weight changes inside, which makes it faster (:func:`fixed_weights`)."""
        with fixed_weights(self.model):
            return self.model.generate(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: a queryable memory cannot be merged into fixed weights exactly.

        Raises:
            ValueError: always; it names the verb that folds.
        """
        raise ValueError(NOT_MERGEABLE)

    def unload(self) -> nn.Module:
        """The base model, without adapter layers and memory."""
        memory: QueryableMemory = getattr(self.model, MEMORY_NAME)
        memory.detach()
        model: nn.Module = super().unload()
        delattr(model, MEMORY_NAME)
        return model


def _entries(model: nn.Module) -> list[nn.Module]:
    """The modules through which a forward pass may enter: the model and, in a causal LM, its decoder."""
    entries = [model]
    if hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        if isinstance(decoder, nn.Module) and decoder is not model:
            entries.append(decoder)
    return entries
