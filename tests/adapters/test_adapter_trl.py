"""TRL's SFTTrainer trains a queryable memory unchanged."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmemtune.adapters import QueryableMemoryConfig, memory_of

trl = pytest.importorskip("trl", reason="trl is not installed")

ROWS = [{"prompt": f"Add {a} and {a + 1}.", "completion": f" The sum is {2 * a + 1}."} for a in range(8)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_sft_trainer_takes_two_steps(tiny_llama_dir, tmp_path, checkpointing, kind):
    quantization = None
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        max_length=64,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama_dir),
        peft_config=QueryableMemoryConfig(
            r=4, num_atoms=4, block_size=2, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    result = trainer.train()
    assert result.global_step == 2
    assert torch.isfinite(torch.tensor(result.training_loss))
    changed = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    # In the first step only B has a gradient; the second moves everything.
    assert any("queryable_core" in name for name in changed)
    assert any("queryable_query" in name for name in changed)
    assert memory_of(trainer.model) is not None
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
