"""Merging a LoRA from file to file: memory, and time against copying the files and against PEFT.

Makes a randomly initialised Llama-shaped model and a LoRA on disk, then measures each in a process of its own, with the
files out of the page cache: ``cp --reflink=never`` and ``sync``; ``merge-export`` without the fidelity check; and, with
``--peft``, PEFT's ``merge_and_unload`` and ``save_pretrained``. Memory is RssAnon, the peak above what the process has
after its imports. Everything is removed in the end.

    python benchmarks/merge.py --shape 8b --folder /some/disk
    python benchmarks/merge.py --shape 1b --peft --folder /some/disk
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from report import write_section

from qmemtune.study.tables import table

SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary: Llama 3.1 8B, Llama 3.2 1B (head not tied)
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (256, 512, 2, 4, 2, 1024),
}
RANK = 16
SHARD = 5 << 30
"""Most bytes of a file."""


def make_model(folder: Path, shape: str) -> None:
    """Write config, shards and index of a model in bfloat16, a piece at a time."""
    import torch
    from transformers import LlamaConfig

    from qmemtune.export.shards import Planned, write_shard

    hidden, inner, layers, heads, pairs, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    noise = (torch.randn(1 << 20) * 0.02).to(torch.bfloat16)

    def pieces(count: int) -> Iterator[torch.Tensor]:
        for start in range(0, count, len(noise)):
            yield noise[: min(len(noise), count - start)].roll(start % 9973)

    def planned(name: str, *size: int) -> Planned:
        count = size[0] * (size[1] if len(size) > 1 else 1)
        return Planned(name, torch.bfloat16, size, lambda: pieces(count))

    tensors = [planned("model.embed_tokens.weight", vocabulary, hidden)]
    for i in range(layers):
        start = f"model.layers.{i}"
        tensors += [planned(f"{start}.{name}.weight", *size) for name, size in linear_layers(shape).items()]
        tensors += [
            planned(f"{start}.{name}.weight", hidden) for name in ("input_layernorm", "post_attention_layernorm")
        ]
    tensors += [planned("model.norm.weight", hidden), planned("lm_head.weight", vocabulary, hidden)]
    files: list[list[Planned]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.size for t in files[-1]) + tensor.size > SHARD:
            files.append([])
        files[-1].append(tensor)
    names = {}
    for number, held in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(folder / name, {"format": "pt"}, held)
        names.update({tensor.name: name for tensor in held})
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def linear_layers(shape: str) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linear layers of a decoder layer."""
    hidden, inner, _, heads, pairs, _ = SHAPES[shape]
    narrow = hidden // heads * pairs
    attention = {"q_proj": hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": hidden}
    return {
        **{f"self_attn.{name}": (width, hidden) for name, width in attention.items()},
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def make_lora(folder: Path, shape: str) -> None:
    """Write a LoRA on all linear layers."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    targets = sorted(name.rpartition(".")[2] for name in linear_layers(shape))
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))
    tensors = {}
    for i in range(SHAPES[shape][2]):
        for name, (out, inside) in linear_layers(shape).items():
            path = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, inside) * 0.02
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class PeakMemory:
    """RssAnon of this process: the peak above the start, in bytes, while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.start, self.peak, self._done = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous() - self.start)

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def merge_ours(root: Path) -> dict[str, float]:
    """merge-export of the run in ``root``."""
    import torch  # noqa: F401 - imported before memory is counted
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from qmemtune.config.adapters import LoraConfig
    from qmemtune.config.schema import Config, DataConfig, ExportConfig, ModelConfig
    from qmemtune.export import export_run
    from qmemtune.rundir import RunDir

    export = ExportConfig(format="merged", path=str(root / "merged"), fidelity=False)
    model, data = ModelConfig(path=str(root / "model")), DataConfig(path="none")
    config = Config(model=model, data=data, adapter=LoraConfig(r=RANK), export=export)
    with PeakMemory() as memory:
        seconds = export_run(RunDir(root / "run"), config)["seconds"]
    return {"seconds": seconds["total"] - seconds["verify"], "verify": seconds["verify"], "memory": memory.peak}


def merge_peft(root: Path) -> dict[str, float]:
    """PEFT's own way."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    with PeakMemory() as memory:
        start = time.perf_counter()
        base = AutoModelForCausalLM.from_pretrained(root / "model", dtype="auto")
        PeftModel.from_pretrained(base, str(root / "run" / "adapter")).merge_and_unload().save_pretrained(root / "peft")
        subprocess.run(["sync"], check=True)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": memory.peak}


def copy(root: Path) -> dict[str, float]:
    """cp and sync."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(root / "model"), str(root / "copy")], check=True)
    subprocess.run(["sync"], check=True)
    return {"seconds": time.perf_counter() - start}


WAYS = {"cp": (copy, "copy"), "ours": (merge_ours, "merged"), "peft": (merge_peft, "peft")}


def measured(way: str, root: Path) -> dict[str, float]:
    """One way in a new process, with the model's files out of the page cache."""
    shutil.rmtree(root / WAYS[way][1], ignore_errors=True)
    subprocess.run(["sync"], check=True)
    for file in (root / "model").iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, "--folder", str(root)], check=True, capture_output=True, text=True
    )
    shutil.rmtree(root / WAYS[way][1], ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(way, found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk with room")
    parser.add_argument("--peft", action="store_true", help="measure PEFT too (holds the model in memory)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/README.md")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way][0](args.folder)))
        return
    hidden, _, layers, _, _, vocabulary = SHAPES[args.shape]
    size = 2 * (2 * vocabulary * hidden + layers * sum(a * b for a, b in linear_layers(args.shape).values()))
    free = shutil.disk_usage(args.folder).free
    if free < 2.1 * size:
        sys.exit(f"skipped: {2.1 * size / 1e9:.0f} GB are needed in {args.folder}, {free / 1e9:.0f} GB are free")
    root = Path(tempfile.mkdtemp(prefix="qmemtune-merge-", dir=args.folder))
    try:
        (root / "model").mkdir()
        make_model(root / "model", args.shape)
        make_lora(root / "run" / "adapter", args.shape)
        ways = ["cp", "ours", *(["peft"] if args.peft else [])]
        rounds = [{way: measured(way, root) for way in ways} for _ in range(args.repeats)]
    finally:
        shutil.rmtree(root)
    largest = 2 * vocabulary * hidden
    lines = []
    for number, found in enumerate(rounds, 1):
        for way in ways:
            result = found[way]
            memory = f"{result['memory'] / 2**20:.0f}" if "memory" in result else ""
            verify = f"{result['verify']:.1f}" if "verify" in result else ""
            ratio = f"{result['seconds'] / found['cp']['seconds']:.2f}"
            lines.append([number, way, f"{result['seconds']:.1f}", ratio, memory, verify])
    heads = ["round", "way", "seconds", "ratio to cp", "peak RssAnon above imports (MiB)", "verification (s)"]
    text = (
        f"{args.shape} shape, {size / 1e9:.1f} GB, largest tensor {largest / 2**20:.0f} MiB, r={RANK} on all linear"
        f" layers; limit for RssAnon {3 * largest / 2**20 + 200:.0f} MiB.\n\n{table(heads, lines)}"
    )
    print(text)
    if args.write:
        write_section(f"Merging from file to file: {args.shape} shape", text)


if __name__ == "__main__":
    main()
