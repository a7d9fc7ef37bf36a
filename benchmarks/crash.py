"""Crashes: small runs are killed (SIGKILL) at random moments, saving included, and resumed.

Every run must then have ended as the same run that nothing disturbed: weights, optimizer, schedule, random states,
log lines (but for times), samples and evaluations. Training processes are forked from one that has everything
imported, so that a start costs a moment; they use one thread.

    python benchmarks/crash.py
    python benchmarks/crash.py --kills 200 --seed 1 --write
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import write_section
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qmemtune.config.compose import compose
from qmemtune.engine.checkpoints import WRITING, complete_checkpoints
from qmemtune.engine.compare import different_files, logged_lines, without_times
from qmemtune.engine.run import train
from qmemtune.rundir import RunDir, read_json
from qmemtune.study.tables import table

WORDS = ["apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "sugar", "house", "green"]
STEPS, EVERY = 14, 2
"""Optimizer steps, and steps between two checkpoints."""
SAVE_SECONDS = 0.05
"""About what writing a checkpoint takes."""
# bfloat16 whatever the machine: it is what "auto" finds where the processor is fast at it.
COMMON = (
    "model.compute_dtype=bfloat16",
    "data.eval_fraction=0.2", "adapter.r=4", "optimizer.learning_rate=0.01", "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=2", f"trainer.max_steps={STEPS}", "trainer.logging_steps=3",
    f"trainer.save_steps={EVERY}",
    "evaluation.every_steps=4", "evaluation.samples.every_steps=5", "evaluation.samples.count=1",
    "evaluation.samples.max_new_tokens=4",
)  # fmt: skip
QUERYABLE = ("adapter=queryable", "adapter.num_atoms=4", "adapter.key_dim=4", "adapter.block_size=1")
PRIOR = ("adapter.instruction_prior=1", "adapter.instruction_prior_final=0", "adapter.prior_kl=0.1")
KINDS = {
    "lora, dropout, rows of like length": ("adapter=lora", "adapter.dropout=0.2", "model.compute_dtype=float32"),
    "lora, packed rows": ("adapter=lora", "adapter.dropout=0.1", "trainer.packing=true", "data.max_length=48"),
    "lora on NF4, two data sets": (
        "adapter=lora", "adapter.dropout=0.1", "quantization=nf4", "~data.path",
        "data.sources.a.path=rows.jsonl", "data.sources.b.path=more.jsonl", "data.sources.b.weight=0.5",
    ),
    "queryable, prior with schedule": (*QUERYABLE, *PRIOR, "adapter.dropout=0.2", "trainer.route_stats_steps=3"),
    "queryable on NF4, random order, best kept": (
        *QUERYABLE, "quantization=nf4", "trainer.length_grouping=false", "trainer.keep_best=true",
        "evaluation.every_steps=2",
    ),
}  # fmt: skip


@dataclass
class Kind:
    """A run that nothing disturbed, and what became of the killed ones."""

    whole: RunDir
    seconds: float
    """From its start to its end."""
    kills: int = 0
    saving: int = 0
    """Kills while a checkpoint was being written."""
    early: int = 0
    """Kills before there was any checkpoint."""
    failed: list[str] = field(default_factory=list)


@dataclass
class Moment:
    """When to kill: so many seconds after the checkpoint of a step has its name, or after the next one is begun."""

    step: int
    saving: bool
    seconds: float

    @classmethod
    def random(cls, draw: random.Random, seconds: float) -> Moment:
        """Any stage of a run that takes so many seconds: a third while it saves, the rest anywhere."""
        saving = draw.random() < 1 / 3
        step = draw.randrange(-EVERY, STEPS + (not saving), EVERY)
        # Below 0: while the run starts.
        between = seconds / 2 if step < 0 else seconds / (STEPS / EVERY)
        return cls(max(step, 0), saving, draw.uniform(0, SAVE_SECONDS if saving else between))


def make_base(folder: Path) -> None:
    """A random Llama of two layers, with a tokenizer of bytes."""
    special = ["<|endoftext|>", "<|pad|>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[1], model_max_length=256
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), pad_token_id=1, eos_token_id=0, **shape)).save_pretrained(
        folder
    )


def write_rows(file: Path, first: int, count: int) -> None:
    """Rows of unequal length."""
    lines = []
    for i in range(first, first + count):
        words = [WORDS[(i * 7 + j * 3) % 10] for j in range(1 + i % 5)]
        lines.append({"prompt": "reverse: " + " ".join(words) + " ->", "completion": " " + " ".join(words[::-1])})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def start(overrides: list[str], log: Path) -> int:
    """Train in a process of its own; gives its number."""
    number = os.fork()
    if number == 0:
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            # A forked process makes its thread pool anew, which loading threads must not do side by side.
            torch.set_num_threads(1)
            train(compose(overrides))
            code = 0
        except BaseException:  # noqa: BLE001 - a forked process must not go on with its parent's work
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return number


def finish(number: int, log: Path) -> str | None:
    """Wait for a process; what went wrong, if anything."""
    _, status = os.waitpid(number, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == 0 else f"exit code {code}: {log.read_text().strip().splitlines()[-1:]}"


def killed(overrides: list[str], log: Path, run: RunDir, moment: Moment) -> bool:
    """Train and kill it at a moment; False if it was done before."""
    number = start(overrides, log)

    def wait_for(what: Callable[[], bool]) -> bool:
        while not what():
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                if status:
                    raise SystemExit(log.read_text())
                return False
            time.sleep(0.0005)
        return True

    until = time.perf_counter()

    def over() -> bool:
        return time.perf_counter() >= until

    if not wait_for(lambda: latest_step(run) >= moment.step):
        return False
    if moment.saving and not wait_for((run.checkpoints / WRITING).exists):
        return False
    until = time.perf_counter() + moment.seconds
    if not wait_for(over):
        return False
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return True


def latest_step(run: RunDir) -> int:
    """Of the checkpoints that have their name; 0 before the first."""
    return max((int(path.name.partition("-")[2]) for path in run.checkpoints.glob("checkpoint-*")), default=0)


def differences(whole: RunDir, run: RunDir) -> list[str]:
    """What a resumed run did otherwise than the whole one."""
    found = [f"{name} of adapter" for name in different_files(whole.adapter, run.adapter)]
    pairs = [complete_checkpoints(folder.checkpoints) for folder in (whole, run)]
    if [c.step for c in pairs[0]] != [c.step for c in pairs[1]]:
        found.append("checkpoints")
    for first, second in zip(*pairs, strict=False):
        found += [f"{name} of step {first.step}" for name in different_files(first.path, second.path)]
    for first_log, second_log in zip(whole.logs, run.logs, strict=True):
        if logged_lines(first_log) != logged_lines(second_log):
            found.append(first_log.name)
    for key in ("eval", "train_loss", "tokens", "steps", "best_step", "best_loss", "final_step"):
        if without_times(read_json(whole.summary)[key]) != without_times(read_json(run.summary)[key]):
            found.append(f"{key} of summary")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/README.md")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    draw, began = random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["QMEMTUNE_CACHE"] = str(root / "cache")
        os.chdir(root)
        make_base(root / "base")
        write_rows(root / "rows.jsonl", 0, 26)
        write_rows(root / "more.jsonl", 26, 20)
        kinds: dict[str, Kind] = {}
        for trial in range(args.kills):
            what = list(KINDS)[trial % len(KINDS)]
            overrides = ["model.path=./base", "data.path=rows.jsonl", *COMMON, *KINDS[what]]
            if what not in kinds:
                whole = RunDir(root / f"whole-{len(kinds)}")
                started, log = time.perf_counter(), root / "log"
                problem = finish(start([*overrides, f"run_dir={whole.path}"], log), log)
                if problem:
                    raise SystemExit(log.read_text())
                seconds = time.perf_counter() - started
                kinds[what] = Kind(whole, seconds)
            failed = len(kinds[what].failed)
            attempt(kinds[what], [*overrides, f"run_dir={root / 'run'}", "resume=auto"], draw, root)
            print(
                f"{trial + 1}/{args.kills} {what}: {kinds[what].failed[failed:] or 'same'}", file=sys.stderr, flush=True
            )
    same = args.kills - sum(len(kind.failed) for kind in kinds.values())
    lines = [
        [what, str(kind.kills), str(kind.saving), str(kind.early), str(len(kind.failed))]
        for what, kind in kinds.items()
    ]
    header = ["run", "kills", "while saving", "before the first checkpoint", "ended otherwise"]
    text = (
        f"`benchmarks/crash.py --kills {args.kills} --seed {args.seed}`, {time.perf_counter() - began:.0f} s: "
        f"{same}/{args.kills} ended as the undisturbed run, bit for "
        f"bit (weights, optimizer, schedule, random states, logs, samples, evaluations). A third was killed twice.\n\n"
        + table(header, lines)
    )
    print(text)
    for what, kind in kinds.items():
        for failure in kind.failed:
            print(f"{what}: {failure}")
    print(f"{same}/{args.kills}")
    if args.write:
        write_section("Crashes: runs killed at random moments and resumed", text)
    sys.exit(same != args.kills)


def attempt(kind: Kind, overrides: list[str], draw: random.Random, root: Path) -> None:
    """Kill a run once or twice, resume it, and compare it with the whole one."""
    run, log = RunDir(root / "run"), root / "log"
    shutil.rmtree(run.path, ignore_errors=True)
    kills = 1 + (draw.random() < 1 / 3)
    while kills:
        log.unlink(missing_ok=True)
        if killed(overrides, log, run, Moment.random(draw, kind.seconds)):
            kills -= 1
            kind.kills += 1
            kind.saving += (run.checkpoints / WRITING).exists()
            kind.early += latest_step(run) == 0
        else:
            shutil.rmtree(run.path, ignore_errors=True)
    problem = finish(start(overrides, log), log)
    found = [problem] if problem else differences(kind.whole, run)
    if found:
        kind.failed.append(", ".join(found))


if __name__ == "__main__":
    main()
