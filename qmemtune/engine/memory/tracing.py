"""One training step on tensors that have a shape and no numbers: how much memory it takes, tensor by tensor.

The step runs the model's own code, the adapter's and the engine's loss under torch's fake tensors. So whatever a model
or an adapter keeps for its backward pass is counted, without a formula for each architecture. Layers that bitsandbytes
replaces stand as ones that make the same temporaries.

Letters: B rows, T tokens, D model width, N labelled positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qmemtune.adapters import prompts_of
from qmemtune.adapters.queryable import memory_of
from qmemtune.data.rows import IGNORED
from qmemtune.engine.fused import fused_layers
from qmemtune.engine.loss import frozen_head_loss
from qmemtune.engine.memory.workload import Workload
from qmemtune.models.attention import mask_of_rows, training_attention
from qmemtune.models.hardware import autocast
from qmemtune.models.head import decoder_of, transform_candidates

CPU = torch.device("cpu")
HEAP_LIMIT = 32 * 2**20
"""Bytes from which on glibc maps every tensor apart, whatever it has learned (DEFAULT_MMAP_THRESHOLD_MAX, 64 bits)."""


@dataclass(frozen=True)
class Traced:
    """Bytes of one step beside weights and optimizer state."""

    activations: float
    """Kept for the backward pass when the forward pass has ended."""
    in_heap: float
    """Of them in tensors so small that glibc takes them from its heap."""
    forward: float
    """Most in the forward pass."""
    loss: float
    """Most while logits and loss are computed, activations included."""
    backward: float
    """Most in the backward pass, gradients of adapter weights included."""

    def plus(self, times: float, more: Traced, less: Traced) -> Traced:
        """This, and ``times`` what ``more`` takes beyond ``less``."""
        difference = {name: getattr(more, name) - getattr(less, name) for name in vars(self)}
        return Traced(**{name: value + times * difference[name] for name, value in vars(self).items()})


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, from when they are made until nothing refers to them.

    Args:
        known: tensors that are there already and do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.live_in_heap = 0
        self.peak = 0
        self._storages: dict[int, Any] = {}
        # Held, so that no other storage gets its address meanwhile.
        self._known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self._see(part)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages or address in self._known:
            return
        self._storages[address] = weakref.ref(storage, lambda _: self._gone(address, size))
        self.live += size
        self.live_in_heap += size if size < HEAP_LIMIT else 0
        self.peak = max(self.peak, self.live)

    def _gone(self, address: int, size: int) -> None:
        if self._storages.pop(address, None) is not None:
            self.live -= size
            self.live_in_heap -= size if size < HEAP_LIMIT else 0

    def take_peak(self) -> int:
        """Most bytes since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


class _Dequantized4Bit(torch.autograd.Function):
    """What a 4-bit product keeps and makes: the weight in the compute type, once in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ torch.empty_like(ctx.weight, dtype=grads[0].dtype), None


class _Dequantized8Bit(_Dequantized4Bit):
    """The same of an 8-bit product, which keeps its input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x = x
        return _Dequantized4Bit.forward(ctx, x, weight)


STAND_INS: dict[str, type[torch.autograd.Function]] = {
    "nf4": _Dequantized4Bit,
    "fp4": _Dequantized4Bit,
    "int8": _Dequantized8Bit,
}
"""What stands for a quantised product, by ``quantization.kind``."""


class Tracer:
    """A run's model, made ready to be traced; the given skeleton is used up.

    Args:
        model: the adapted skeleton.
        dtype: of the arithmetic and of the base's weights.
        quantised: the layers that are quantised.
        quantization: how; ``none`` where products are computed with whole weights (copies on a CPU, too).
        on_cpu: whether the run is on a CPU.
        own_attention: whether it has :func:`qmemtune.models.attention.training_attention`.
        fused: whether layers run in their fused forms.
        unit: decoder layers that are alike only together (a block of a memory).
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        dtype: torch.dtype,
        quantised: list[nn.Linear],
        quantization: str,
        on_cpu: bool,
        own_attention: bool,
        fused: bool = False,
        unit: int = 1,
    ) -> None:
        self.model, self.dtype, self.unit = model, dtype, unit
        self.on_cpu, self.own_attention, self.fused = on_cpu, own_attention, fused
        self.mode = FakeTensorMode()
        self.lm = model.get_base_model()
        if quantization in STAND_INS:
            for layer in quantised:
                layer.__dict__["forward"] = _StandIn(layer, STAND_INS[quantization], dtype)
        self._fill()
        self.model.train()

    def _fill(self) -> None:
        """Give every parameter and buffer the device and type that it will have."""
        made: dict[int, Any] = {}
        with self.mode:
            for module in self.model.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        dtype = torch.float32 if value.requires_grad else self.dtype
                        if id(value) not in made:
                            fake = torch.empty(value.shape, dtype=dtype, device=CPU)
                            made[id(value)] = nn.Parameter(fake, requires_grad=value.requires_grad), value
                        module._parameters[name] = made[id(value)][0]
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CPU)

    def step(self, batch: Workload) -> Traced:
        """Trace one step."""
        decoder = decoder_of(self.lm)
        found = _decoder_layers(decoder)
        if found is None or len(found[1]) <= 3 * self.unit:
            return self._step(batch)
        # Layers are alike: short models say what one more layer adds, and one more block, in a fraction of the time.
        name, every = found

        def of_layers(*indices: int) -> Traced:
            setattr(decoder, name, nn.ModuleList([every[i] for i in indices]))
            return self._step(batch)

        try:
            two, three = of_layers(0, 1), of_layers(0, 1, 2)
            traced = three.plus(len(every) - 3, three, two)
            if self.unit > 1:
                blocks = -(-len(every) // self.unit)
                traced = traced.plus(blocks - 1, of_layers(0, 1, 2 * self.unit), three)
        finally:
            setattr(decoder, name, every)
        return traced

    def _step(self, batch: Workload) -> Traced:
        rows, tokens, lengths = batch.rows, batch.tokens, batch.lengths
        decoder, head = decoder_of(self.lm), self.lm.get_output_embeddings()
        transform = transform_candidates(self.lm)[-1]
        attention = training_attention(written_out=self.on_cpu) if self.own_attention else nullcontext()
        fused = fused_layers(self.model) if self.fused else nullcontext()
        with self.mode, attention, fused, self._checkpointed(batch.checkpointing):
            numbers = None
            if batch.together is not None:
                ids = torch.empty((1, batch.together), dtype=torch.long)
                numbers = torch.empty_like(ids)
                if self.own_attention:
                    mask = mask_of_rows(lengths, CPU, together=self.on_cpu)
                else:
                    mask = torch.empty((1, 1, batch.together, batch.together), dtype=torch.bool)
            else:
                # Every row as long as the longest, with a mask: what a batch takes at most.
                ids = torch.empty((rows, tokens), dtype=torch.long)
                mask = torch.empty((rows, 1, tokens, tokens), dtype=torch.bool)
            targets = torch.empty(batch.labelled, dtype=torch.long)
            there = [ids, mask, targets, *self.model.parameters(), *self.model.buffers()]
            counter = LiveBytes(there)
            try:
                with self._instructed(rows, numbers), counter:
                    # Routes of whole rows take what they take, whatever is prompt.
                    with self._autocast(), prompts_of(self.model, ids, IGNORED):
                        hidden = decoder(
                            input_ids=ids,
                            attention_mask=mask,
                            position_ids=None if numbers is None else torch.empty_like(numbers),
                            use_cache=False,
                            return_dict=True,
                        )[0]
                        activations, in_heap, forward = counter.live, counter.live_in_heap, counter.take_peak()
                        chosen = hidden.flatten(0, 1)[: batch.labelled]
                        total = frozen_head_loss(chosen, targets, head, transform, on_gpu=not self.on_cpu)
                    loss = counter.take_peak()
                    del hidden, chosen
                    total.backward()
                    backward = counter.take_peak()
            finally:
                for parameter in self.model.parameters():
                    parameter.grad = None
        return Traced(activations, in_heap, forward, loss, backward)

    def _instructed(self, rows: int, numbers: Tensor | None) -> AbstractContextManager[Any]:
        """Where there is an instruction prior, every row with an instruction, as a batch has at most.

        ``numbers``, (1, tokens of all rows), says which row a token is of where they stand one behind the other.
        """
        memory = memory_of(self.model)
        if memory is None:
            return nullcontext()
        widths = {name: config.prior_dim for name, config in memory.configs.items() if config.has_prior}
        return memory.instructed({name: torch.empty(rows, width) for name, width in widths.items() if width}, numbers)

    def _autocast(self) -> AbstractContextManager[Any]:
        # float16 does not train on a CPU, and takes what bfloat16 takes.
        return autocast(CPU, torch.float32 if self.dtype == torch.float32 else torch.bfloat16)

    @contextmanager
    def _checkpointed(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        # Numbers are not there, so their random state need not be kept either.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        switches = ("activation_checkpointing", "gradient_checkpointing")
        prefix = next(name for name in switches if hasattr(self.lm, f"{name}_enable"))
        getattr(self.lm, f"{prefix}_enable")(**{f"{prefix}_kwargs": options})
        try:
            yield
        finally:
            getattr(self.lm, f"{prefix}_disable")()


class _StandIn:
    """Stands in the place of a quantised layer's forward."""

    def __init__(self, layer: nn.Linear, product: type[torch.autograd.Function], dtype: torch.dtype) -> None:
        self.layer, self.product, self.dtype = layer, product, dtype

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.product.apply(x.to(self.dtype), self.layer.weight).to(x.dtype)
        return result if self.layer.bias is None else result + self.layer.bias

    def weight_in(self, dtype: torch.dtype) -> Tensor | None:
        """The weight of a 4-bit layer, made anew; None for other layers, which have no fused form."""
        return torch.empty_like(self.layer.weight, dtype=dtype) if self.product is _Dequantized4Bit else None


def _decoder_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The decoder's list of layers and its name, where layers are alike and the decoder runs what is in the list."""
    config = getattr(decoder, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if len(set(getattr(config, "layer_types", None) or [None])) > 1:
        return None
    for name, module in decoder.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None
