"""The peer of benchmarks/train.py: TRL's SFTTrainer with PEFT LoRA on the CPU or one GPU; prints one JSON line.

The same base folder, rows, text, batch, rank, targets and schedule as ours. Real tokens are counted (padding is not),
and the first two steps are left out of the speed, as in ours.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="a folder")
parser.add_argument("--train", required=True)
parser.add_argument("--eval", required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--learning-rate", type=float, required=True)
parser.add_argument("--max-length", type=int, required=True)
parser.add_argument("--quantization", choices=["none", "nf4"], required=True)
parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--mode", choices=["default", "grouped", "packing"], default="default")
args = parser.parse_args()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(path: str) -> Dataset:
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [
            {"prompt": f"Question: {r['question']}\nAnswer:", "completion": " " + re.sub(r"<<.*?>>", "", r["answer"])}
            for r in lines
        ]
    )


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.steps, self.first_done = [], None

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.first_done = self.first_done or now - STARTED
        self.steps.append(now - self.begun)


class Counted(SFTTrainer):
    """Counts the real tokens of each step."""

    tokens: list[int] = []

    def training_step(self, model: torch.nn.Module, inputs: dict, *rest: object, **options: object) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return super().training_step(model, inputs, *rest, **options)


quantization = None
if args.quantization == "nf4":
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
        bnb_4bit_use_double_quant=True,
    )
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(
    args.model, quantization_config=quantization, dtype=getattr(torch, args.dtype), device_map=device
)
clock = Clock()
set_seed(args.seed)
trainer = Counted(
    model=model,
    processing_class=tokenizer,
    train_dataset=rows(args.train),
    eval_dataset=rows(args.eval),
    peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, task_type="CAUSAL_LM", target_modules=TARGETS),
    args=SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=8,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        max_length=args.max_length,
        completion_only_loss=True,
        packing=args.mode == "packing",
        train_sampling_strategy="group_by_length" if args.mode == "grouped" else "random",
        report_to="none",
        seed=args.seed,
        save_strategy="no",
        logging_steps=10,
        use_cpu=device == "cpu",
        # On a GPU as TRL has it by default; on a CPU its casts for autocast cost more than they bring.
        bf16=None if device == "cuda" else False,
        gradient_checkpointing=args.checkpointing,
        torch_compile=args.compile,
        disable_tqdm=True,
    ),
    callbacks=[clock],
)
trainer.train()


@torch.no_grad()
def token_loss() -> float:
    """Mean over all held-out tokens in the loss; Trainer's own is a mean of batches' means."""
    total, count = 0.0, 0
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        labels = batch["labels"][:, 1:].flatten()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        logits = trainer.model(**inputs).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits[labels != -100].float(), labels[labels != -100], reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


print(
    json.dumps(
        {
            "tokens_per_s": sum(Counted.tokens[2:]) / sum(clock.steps[2:]),
            "step_s_median": statistics.median(clock.steps[2:]),
            "first_step_done_s": clock.first_done,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20
            if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "eval_loss": token_loss(),
        }
    )
)
