"""The model card (README.md) of an exported folder: what it is, how it was made and measured, how to load it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from qmemtune.adapters.files import WEIGHTS
from qmemtune.config.adapters import QueryableConfig
from qmemtune.config.export import LIVE_FORMATS
from qmemtune.config.schema import Config
from qmemtune.engine.manifest import sha256
from qmemtune.export.exactness import rank_of
from qmemtune.export.marker import public
from qmemtune.models.sources import PACKAGE, Source
from qmemtune.rundir import RunDir, read_json

METRICS = ("loss", "perplexity", "exact_match")
FORMS = {
    "merged": "a complete model; the update is part of its weights",
    "lora": "a standard PEFT LoRA adapter",
    **dict.fromkeys(LIVE_FORMATS, "the exact, input-dependent model: the adapter as trained, a PEFT folder"),
}
METHODS = {
    "lora": "LoRA through PEFT.",
    "queryable": "A queryable memory: low-rank update atoms shared by all adapted layers and mixed anew for each token"
    ' ("Queryable LoRA", arXiv 2605.08423).',
}
BITS = {
    "nf4": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant={double})",
    "fp4": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='fp4', bnb_4bit_use_double_quant={double})",
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
}
GGUF_ARGUMENT = "gguf_file="


def write_card(folder: Path, run: RunDir, config: Config, source: Source, result: dict[str, Any]) -> None:
    """Write README.md of an exported folder.

    Args:
        source: the base model's.
        result: what the export reports.
    """
    parts = [
        front_matter(config, source),
        f"# {config.description or f'{source.origin}, fine-tuned'}",
        f"Form: {FORMS[config.export.format]}.",
        making(config, source, result),
        "## Load it\n\n" + loading(config, source),
        "## Measured\n\n" + measured(run),
        "## Fidelity of this export\n\n" + fidelity_text(result),
        "## Parameters\n\n" + parameters(config),
        "## Licence\n\n" + licence(config),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(config: Config, source: Source) -> str:
    """The card's metadata, as the hub reads it; the base is named only if the hub knows it."""
    lines = ["---", f"library_name: {'transformers' if config.export.format == 'merged' else 'peft'}"]
    lines.append("pipeline_tag: text-generation")
    if config.export.license is not None:
        lines.append(f"license: {config.export.license}")
    if not source.is_local:
        lines.append(f"base_model: {source.origin}")
    lines += ["tags:", "- qmemtune", f"- {'lora' if config.adapter.kind == 'lora' else 'queryable-memory'}", "---"]
    return "\n".join(lines)


def licence(config: Config) -> str:
    """What is known of the licence."""
    own = "" if config.export.license is None else f"This export: {config.export.license}. "
    return f"{own}The licences of the base model and of the data apply."


def making(config: Config, source: Source, result: dict[str, Any]) -> str:
    """Base, data and method."""
    paths = [s.path for s in config.data.sources.values()] or [config.data.path]
    data = ", ".join(PurePath(path).name if PurePath(path).suffix else public(path) for path in paths)
    precision = "unquantised" if config.quantization.kind == "none" else f"quantised to {config.quantization.kind}"
    base = source.origin if source.revision is None else f"{source.origin} (revision {source.revision})"
    digest = result.get("base_sha256")
    pin = f" (SHA-256 of its weights: {digest})" if digest else ""
    return f"- Base: {base}{pin}, {precision} during training\n- Data: {data}\n- Method: {METHODS[config.adapter.kind]}"


def loading(config: Config, source: Source) -> str:
    """How to load the folder with several tools, with placeholders for places."""
    if config.export.format == "merged":
        text = code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
            *answering(),
        )
        gguf = "convert_hf_to_gguf.py THIS_FOLDER --outfile model.gguf && llama-cli -m model.gguf"
        if config.export.gguf:
            gguf = f"llama-cli -m THIS_FOLDER/model-{config.export.gguf}.gguf"
        return f"{text}\n\nvLLM: `vllm serve THIS_FOLDER`\n\nllama.cpp: `{gguf}`"
    text = code(*adapter_loading(config, source))
    if config.export.format == "lora" or config.adapter.kind == "lora":
        return (
            f"{text}\n\nvLLM: `vllm serve BASE --enable-lora --lora-modules tuned=THIS_FOLDER"
            f" --max-lora-rank {rank_of(config)}`\n\nllama.cpp: `convert_lora_to_gguf.py THIS_FOLDER --base BASE`,"
            " then `llama-cli -m BASE.gguf --lora FILE.gguf`"
        )
    return (
        f'{text}\n\ntransformers alone, after the same import: `base.load_adapter("THIS_FOLDER")`\n\nOther servers'
        " (vLLM, llama.cpp) know no input-dependent adapter: export with `export.format=lora` or `merged` for them."
    )


def adapter_loading(config: Config, source: Source) -> list[str]:
    """Lines that put the adapter on its base and answer a prompt."""
    live_memory = config.adapter.kind == "queryable" and config.export.is_live
    bits = BITS.get(config.quantization.kind, "").format(double=config.quantization.double_quant)
    lines = ["from peft import PeftModel"]
    lines.append(
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if bits else ''}"
    )
    if live_memory:
        lines.append("import qmemtune.adapters  # makes PEFT know the queryable memory")
    lines.append("")
    base = base_argument(source)
    if bits and GGUF_ARGUMENT in base:
        lines += [
            "# Once: transformers quantises no GGUF file, and saves none that it still takes for one.",
            f"plain = AutoModelForCausalLM.from_pretrained({base})",
            'plain.hf_quantizer, _ = None, vars(plain.config).pop("quantization_config", None)',
            'plain.save_pretrained("UNPACKED_BASE")',
        ]
        base = '"UNPACKED_BASE"'
    quantised = f", quantization_config={bits}" if bits else ""
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({base}{quantised})")
    lines.append('model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()')
    lines.append('tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")')
    prior = config.adapter.instruction_prior if isinstance(config.adapter, QueryableConfig) else 0.0
    instructed = live_memory and prior > 0
    return lines + answering("qmemtune.adapters.InstructionSource(model, tokenizer)" if instructed else None)


def answering(instructions: str | None = None) -> list[str]:
    """Lines that answer a prompt."""
    generate = "output = model.generate(**inputs, max_new_tokens=64)"
    lines = ['inputs = tokenizer("YOUR PROMPT", return_tensors="pt")']
    if instructions is None:
        lines.append(generate)
    else:
        lines += [f'with {instructions}.context(["YOUR INSTRUCTION"]):', f"    {generate}"]
    return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]


def base_argument(source: Source) -> str:
    """What ``from_pretrained`` takes for the base model."""
    if not source.is_local:
        return f'"{source.location}"' + (f', revision="{source.revision}"' if source.revision else "")
    name = source.origin.removeprefix(PACKAGE)
    folder, _, file = name.rpartition("/")
    if file.lower().endswith(".gguf"):
        return f'"FOLDER_OF_{folder or "THE_FILE"}", {GGUF_ARGUMENT}"{file}"'
    return f'"{name}"'


def measured(run: RunDir) -> str:
    """Held-out results of the run, base and tuned side by side where both were measured."""
    results = own_evaluation(run)
    if results is None:
        summary = read_json(run.summary) if run.summary.is_file() else {}
        results = {"tuned": summary.get("eval")}
    found = {name: results.get(name) for name in ("base", "tuned")}
    columns = {name: values for name, values in found.items() if isinstance(values, dict)}
    rows = [metric for metric in METRICS if any(number(values.get(metric)) for values in columns.values())]
    if not rows:
        return "Nothing was measured on held-out rows."
    lines = [f"| held-out | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for metric in rows:
        cells = [f"{values[metric]:.4f}" if number(values.get(metric)) else "" for values in columns.values()]
        lines.append(f"| {metric.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nOf the live model; see the next section for this export."


def own_evaluation(run: RunDir) -> dict[str, Any] | None:
    """What ``eval`` found last, if it measured the adapter as it is now, on the run's own rows."""
    if not run.evaluation.is_file():
        return None
    results = read_json(run.evaluation)
    asked = results.get("overrides", [None])
    own_rows = all(isinstance(override, str) and override.startswith("evaluation") for override in asked)
    return results if own_rows and results.get("adapter_sha256") == sha256(run.adapter / WEIGHTS) else None


def fidelity_text(result: dict[str, Any]) -> str:
    """How far the export is from the live model."""
    numbers = result["fidelity"]
    text = "Exact, up to rounding." if result["exact"] else f"Not exact. {result['note']}"
    if numbers is None:
        return f"{text} **Not measured**: the check was switched off, or the run has no held-out rows."
    lines = [
        text,
        "",
        f"On {numbers['rows']} held-out rows ({numbers['tokens']} tokens):",
        "",
        "| | live | exported |",
        "| --- | ---: | ---: |",
        f"| loss | {numbers['loss_live']:.4f} | {numbers['loss_exported']:.4f} |",
        f"| perplexity | {numbers['perplexity_live']:.4f} | {numbers['perplexity_exported']:.4f} |",
    ]
    if numbers.get("exact_match_rows"):
        lines.append(
            f"| exact match ({numbers['exact_match_rows']} rows) | {numbers['exact_match_live']:.1%}"
            f" | {numbers['exact_match_exported']:.1%} |"
        )
    lines += [
        "",
        f"KL(live || exported), nats a token: mean {numbers['kl_mean']:.2e}, largest {numbers['kl_max']:.2e}."
        f" Both models hold the same token for the likeliest at {numbers['same_token']:.1%} of the positions.",
    ]
    if result["forced"]:
        lines += ["", f"**Kept by force though too far from the live model**: {'; '.join(result['too_far'])}."]
    return "\n".join(lines)


def parameters(config: Config) -> str:
    """Adapter, optimizer and training length as a list."""
    chosen: dict[str, Any] = {f"adapter.{key}": value for key, value in asdict(config.adapter).items()}
    for key in ("name", "learning_rate", "weight_decay", "schedule"):
        chosen[f"optimizer.{key}"] = getattr(config.optimizer, key)
    for key in ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
        chosen[f"trainer.{key}"] = getattr(config.trainer, key)
    chosen["seed"] = config.seed
    return "\n".join(f"- {key}: {public(value)}" for key, value in chosen.items() if value not in (None, []))


def number(value: Any) -> bool:
    """Whether ``value`` can be shown as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def code(*lines: str) -> str:
    """A Python code block."""
    return "\n".join(["```python", *lines, "```"])
