"""Trains tiny models for a few steps as one process of several; started by test_adapter_two_processes.py.

Arguments: a folder for the rendezvous file and the results, then the names of variants.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import get_peft_model
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from qmemtune.adapters import QueryableMemoryConfig, auxiliary_loss, memory_of

VARIANTS: dict[str, dict] = {
    "plain": {},
    "checkpointed": {},
    "top_k": {"top_k": 2},
    "one_block": {"block_size": 4},
    "a_layer_a_block": {"block_size": 1},
    "no_summary": {"depth_summary": False},
    "prior": {"instruction_prior": 0.7, "prior_kl": 0.2},
    "prior_on_one_rank_only": {"instruction_prior": 0.7},
    "prior_without_instructions": {"instruction_prior": 0.7, "prior_kl": 0.2},
}
ROWS, LENGTH, STEPS = 4, 8, 3


def instructions(variant: str) -> torch.Tensor | None:
    """Embeddings of the global batch's rows, zeros for none."""
    if variant not in ("prior", "prior_on_one_rank_only"):
        return None
    given = F.normalize(torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(5)), dim=-1)
    if variant == "prior_on_one_rank_only":
        given[ROWS // 2 :] = 0
    return given


def train(variant: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    options = {"r": 4, "num_atoms": 6, "key_dim": 8, "block_size": 2, "temperature": 2.0, **VARIANTS[variant]}
    model = get_peft_model(
        LlamaForCausalLM(config), QueryableMemoryConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    ).train()
    if variant == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    memory = memory_of(model)
    runner = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for step in range(STEPS):
        ids = torch.randint(3, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))[mine]
        given = instructions(variant)
        with nullcontext() if given is None else memory.instructed(given[mine]):
            loss = runner(input_ids=ids, labels=ids).loss
        extra = auxiliary_loss(model)
        (loss if extra is None else loss + extra).backward()
        if step:
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    folder, variants = Path(sys.argv[1]), sys.argv[2:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save({variant: train(variant, rank, world) for variant in variants}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
