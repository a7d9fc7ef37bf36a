"""How much memory a run takes at its peak, by part."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.schema import Config
from qmemtune.engine.compiling import has_fused_layers, has_training_attention
from qmemtune.engine.memory.skeleton import adapted_skeleton, base_skeleton
from qmemtune.engine.memory.traces import read_trace, trace_file, write_trace
from qmemtune.engine.memory.tracing import Traced, Tracer
from qmemtune.engine.memory.weights import base_bytes, optimizer_bytes, quantised_layers
from qmemtune.engine.memory.workload import Workload
from qmemtune.models.dequantized import copies_fit
from qmemtune.models.fingerprint import NOT_COUNTED
from qmemtune.models.hardware import bf16_is_fast, compute_dtype
from qmemtune.models.kernel_caches import kept_bytes
from qmemtune.models.sources import stored_bytes

CUDA_RUNTIME = 600 * 2**20
"""What CUDA's context and its libraries take of a GPU."""
CUDA_FRAGMENTS = 0.03
"""Share of a step's tensors that torch's allocator takes on top: it hands out whole blocks. Not measured."""
HEAP_FRAGMENTS, HEAP_FRAGMENTS_FUSED = 0.55, 0.15
"""What glibc's heap takes on top on a CPU, as a share of the activations that lie in it without checkpointing: freed
temporaries leave holes that aligned tensors do not fit into, in recomputation just as much. Fused layers leave few.
Fitted to configurations of benchmarks/memory.py; with MALLOC_MMAP_THRESHOLD_=131072, which gives every tensor pages of
its own, two of them measured within 1 % of the estimate without this part."""
INT8_HOLES = 1.6
"""Bytes a weight that loading an 8-bit base leaves in the heap for a while; measured on SmolLM2-135M."""
WAITING = 2 / 3
"""Share of a 4-bit base's layers that are read but not yet quantised when loading takes most: threads read while one
quantises. Fitted to two configurations of benchmarks/memory.py; it differs from run to run."""
MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""Environment variable: from so many bytes on glibc gives memory back as soon as it is freed."""
SMALL_THRESHOLD = 2**20
TRAINED_ITEMSIZE = 4
"""Adapter weights and their gradients are float32, in memory and in files."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of training, by part; ``total`` is their sum."""

    device: str
    """cpu: resident memory of the process; cuda: memory of the GPU."""
    workload: Workload
    runtime: float
    """Python and libraries (on a GPU: CUDA's context) before anything is loaded."""
    base_weights: float
    dequantized_copies: float
    """Copies of 4-bit weights that make training on a CPU faster."""
    adapter: float
    gradients: float
    optimizer_state: float
    activations: float
    logits: float
    """At labelled positions, a chunk at a time, with what their loss makes of them; 0 where the peak is elsewhere."""
    temporaries: float
    """What else exists for a moment at the peak: dequantised weights, gradients of activations."""
    fragmentation: float
    """Memory that the allocator holds and cannot use."""
    kernels: float
    """What torch keeps for products of shapes that it has met, in bfloat16 on a CPU."""
    peak_in: str
    """Part of a step that takes most: forward, loss or backward."""
    loading: float
    """Resident memory at most while weights are read, with the pages of their files; not part of the total."""

    PARTS = (
        "runtime",
        "base_weights",
        "dequantized_copies",
        "adapter",
        "gradients",
        "optimizer_state",
        "activations",
        "logits",
        "temporaries",
        "fragmentation",
        "kernels",
    )

    @property
    def total(self) -> float:
        """Bytes at the peak of training."""
        return float(sum(getattr(self, part) for part in self.PARTS))

    @property
    def peak(self) -> float:
        """The process's largest resident memory: in training, or earlier, while weights were read."""
        return max(self.total, self.loading)

    def as_dict(self) -> dict[str, Any]:
        """In MiB (2^20 bytes), rounded."""
        return {
            "device": self.device,
            "workload": vars(self.workload),
            "parts_mib": {part: mib(getattr(self, part)) for part in self.PARTS},
            "total_mib": mib(self.total),
            "peak_in": self.peak_in,
            "loading_mib": mib(self.loading),
            "peak_mib": mib(self.peak),
        }


def mib(size: float) -> float:
    """Bytes in MiB."""
    return round(size / 2**20, 1)


class RunMemory:
    """Estimates a run's memory for any batch.

    Args:
        config: the run.
        device: where it trains.
        runtime: resident memory without the model, bytes; that of this process now if not given.
        base: the base's skeleton, used up; if not given, it is read, and a local model folder has to hold the weights.
        dtype: of the arithmetic; if not given, the config's.
        processes: of the run, on this machine.

    ``model`` is the adapted skeleton.

    Raises:
        UserError: there is no such model, or it cannot have this adapter.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        runtime: float | None = None,
        base: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        processes: int = 1,
    ) -> None:
        self.config, self.on_cpu = config, device.type == "cpu"
        self.runtime = resident_bytes() if runtime is None else runtime
        base = base_skeleton(config) if base is None else base
        self.dtype = dtype or compute_dtype(config.model.compute_dtype, device)
        quantization = config.quantization
        quantised = quantised_layers(base, quantization)
        self.base_parameters = sum(parameter.numel() for parameter in base.parameters())
        self.base_weights = base_bytes(base, quantised, quantization, self.dtype.itemsize)
        stored = stored_bytes(config.model.path) or self.base_parameters * 2
        # Weights that stay as they are stored are not read into memory beside the file: they are the mapped file.
        mapped = quantization.kind == "none" and abs(stored - self.base_weights) < 0.01 * stored
        self.read = 0 if mapped else stored
        small = sum(layer.weight.numel() for layer in quantised)
        copies = small * self.dtype.itemsize
        self.holes = INT8_HOLES * small if quantization.kind == "int8" else WAITING * copies
        has_copies = (
            self.on_cpu
            and quantization.kind in ("nf4", "fp4")
            and quantization.dequantized_copies == "auto"
            and copies_fit(copies, processes)
        )
        self.copies = copies if has_copies else 0
        own = {id(parameter) for parameter in base.parameters()}
        self.model = adapted_skeleton(config, base)
        added: list[nn.Parameter] = [p for p in self.model.parameters() if id(p) not in own]
        self.adapter = sum(parameter.numel() for parameter in added) * TRAINED_ITEMSIZE
        trained = [parameter for parameter in added if parameter.requires_grad]
        self.gradients = sum(parameter.numel() for parameter in trained) * TRAINED_ITEMSIZE
        self.optimizer_state = optimizer_bytes(trained, config.optimizer)
        self.fused = has_fused_layers(config)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "quantization": "none" if has_copies else quantization.kind,
            "on_cpu": self.on_cpu,
            "own_attention": has_training_attention(config),
            "fused": self.fused,
            "unit": config.adapter.block_size if isinstance(config.adapter, QueryableConfig) else 1,
        }
        self._tracer = lambda: Tracer(self.model, quantised=quantised, **options)
        self._key: dict[str, Any] = {
            **options,
            "model": described(base),
            "attention": config.model.attn_implementation,
            "adapter": {name: value.to_dict() for name, value in self.model.peft_config.items()},
        }
        self._made: Tracer | None = None
        self._traced: dict[Workload, Traced] = {}

    def estimate(self, workload: Workload) -> Estimate:
        """The peak with such batches."""
        traced = self._trace(workload)
        # In the forward pass gradients of earlier batches are there only while they are accumulated.
        earlier = self.gradients if workload.accumulation > 1 else 0
        phases = {
            "forward": traced.forward + earlier,
            "loss": traced.loss + earlier,
            "backward": traced.backward + earlier,
        }
        peak_in = max(phases, key=lambda name: phases[name])
        dynamic = max(phases[peak_in], traced.activations + self.gradients)
        rest = dynamic - traced.activations - self.gradients
        fragmented = CUDA_FRAGMENTS * dynamic
        if self.on_cpu:
            # Layers in 8 bits have a forward pass of their own.
            share = heap_fragments(self.fused and self.config.quantization.kind != "int8")
            fragmented = share * self._trace(replace(workload, checkpointing=False)).in_heap if share else 0.0
        return Estimate(
            device="cpu" if self.on_cpu else "cuda",
            workload=workload,
            runtime=self.runtime if self.on_cpu else CUDA_RUNTIME,
            base_weights=self.base_weights,
            dequantized_copies=self.copies,
            adapter=self.adapter,
            gradients=self.gradients,
            optimizer_state=self.optimizer_state,
            activations=traced.activations,
            logits=rest if peak_in == "loss" else 0.0,
            temporaries=0.0 if peak_in == "loss" else rest,
            fragmentation=fragmented,
            kernels=self._kernels(workload),
            peak_in=peak_in,
            loading=self.runtime + self.base_weights + self.read + self.holes if self.on_cpu else 0.0,
        )

    def _kernels(self, workload: Workload) -> float:
        if not self.on_cpu or self.dtype != torch.bfloat16 or not bf16_is_fast(torch.device("cpu")):
            return 0.0
        return kept_bytes(other_shapes=workload.together != workload.rows * workload.tokens)

    def _trace(self, workload: Workload) -> Traced:
        # How many batches are accumulated changes nothing in one of them.
        batch = replace(workload, accumulation=1)
        if batch not in self._traced:
            # A model's own code may change while its config does not.
            file = None if self.config.model.trust_remote_code else trace_file({**self._key, "batch": vars(batch)})
            traced = None if file is None else read_trace(file)
            if traced is None:
                if self._made is None:
                    self._made = self._tracer()
                traced = self._made.step(batch)
                if file is not None:
                    write_trace(file, traced)
            self._traced[batch] = traced
        return self._traced[batch]


def described(base: nn.Module) -> dict[str, Any]:
    """What a model's config says of the model."""
    config: Any = base.config
    return {name: value for name, value in config.to_dict().items() if name not in NOT_COUNTED}


def heap_fragments(fused: bool) -> float:
    """Share of the activations that the heap takes on top in this process's environment, with fused layers or not."""
    threshold = os.environ.get(MMAP_THRESHOLD, "")
    small = threshold.isdecimal() and int(threshold) <= SMALL_THRESHOLD
    if small:
        return 0.0
    return HEAP_FRAGMENTS_FUSED if fused else HEAP_FRAGMENTS


def resident_bytes() -> int:
    """Resident memory of this process."""
    size: int = psutil.Process().memory_info().rss
    return size
