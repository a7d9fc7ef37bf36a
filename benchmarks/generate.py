"""Greedy answers to a run's held-out rows: as an evaluation makes them, and by plain ``generate``, one row at a time.

Both have the same model, data type and limits, and stop at the same tokens; they take turns in one process. Printed are
rows a second, the median ratio of neighbouring rounds, and how many answers are equal (batched and single products
round differently, which now and then changes a close choice).

    qmemtune train recipe=quickstart
    python benchmarks/generate.py runs/quickstart/... --rows 40 --rounds 3 --write
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import spread, write_section

from qmemtune.config.of_run import load_resolved
from qmemtune.data.encode import decoded
from qmemtune.data.prepare import prepare_heldout
from qmemtune.engine.restore import LoadedRun, load_run
from qmemtune.evaluation.decode import end_tokens, greedy_answers, until_end
from qmemtune.evaluation.guard import undisturbed
from qmemtune.evaluation.samples import evenly_spaced
from qmemtune.models.hardware import autocast
from qmemtune.rundir import RunDir
from qmemtune.study.tables import table


def one_at_a_time(live: LoadedRun, rows: list[Any], max_new_tokens: int) -> list[str]:
    """The loop that a script has."""
    answers, ends = [], end_tokens(live.model, live.tokenizer)
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]], device=live.device)
        with torch.no_grad(), autocast(live.device, live.dtype), live.source.context([row["instruction"]]):
            output = live.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=live.tokenizer.pad_token_id,
            )
        answers.append(decoded(live.tokenizer, until_end(output[0, ids.shape[1] :].tolist(), ends)))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run's folder")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/README.md")
    args = parser.parse_args()

    run = RunDir(Path(args.run))
    config = load_resolved(run.config, []).config
    live = load_run(run, config)
    rows = list(evenly_spaced(prepare_heldout(config.data, live.tokenizer).heldout, args.rows))
    limit = config.evaluation.exact_match.max_new_tokens
    cast = partial(autocast, live.device, live.dtype)
    rates: dict[str, list[float]] = {"one at a time": [], "batched": []}
    with undisturbed(live.model):
        for _ in range(args.rounds):
            start = time.perf_counter()
            single = one_at_a_time(live, rows, limit)
            middle = time.perf_counter()
            batched = greedy_answers(
                live.model,
                live.tokenizer,
                rows,
                max_new_tokens=limit,
                batch_size=config.evaluation.per_device_eval_batch_size,
                source=live.source,
                autocast=cast,
            )
            rates["one at a time"].append(len(rows) / (middle - start))
            rates["batched"].append(len(rows) / (time.perf_counter() - middle))
    equal = sum(a == b.text for a, b in zip(single, batched, strict=True)) / len(rows)
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    header = ["rows", "one at a time (rows/s)", "batched (rows/s)", "ratio", "equal answers"]
    medians = [f"{statistics.median(values):.2f}" for values in rates.values()]
    heading = f"Generation for exact match: {config.recipe}, {config.adapter.kind}, answers of up to {limit} tokens"
    text = f"`benchmarks/generate.py`, {args.rounds} rounds; the ratio's median (smallest to largest).\n\n" + table(
        header, [[len(rows), *medians, spread(ratios, 2), f"{equal:.0%}"]]
    )
    print(f"### {heading}\n\n{text}")
    if args.write:
        write_section(heading, text)


if __name__ == "__main__":
    main()
