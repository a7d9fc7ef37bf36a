"""Merging from file to file: what is kept, what is refused, and what a killed attempt leaves."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmemtune.config.adapters import LoraConfig
from qmemtune.config.model import QuantizationConfig
from qmemtune.engine.restore import load_run
from qmemtune.errors import RunFailed, UserError
from qmemtune.export import destination, export_run
from qmemtune.export.destination import check_destination, written_whole
from qmemtune.export.shards import MappedShard, Planned, read_shard, verify_shard, write_shard
from qmemtune.models.bitsandbytes import dequantised_weight, is_quantised
from qmemtune.models.round_trip import RoundTrip


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 32)])
def test_round_trip_is_what_a_quantised_layer_computes_with(
    make_run, tiny_llama_dir, kind: str, double_quant: bool, dtype: torch.dtype, width: int
) -> None:
    run, config = make_run(LoraConfig(r=2), kind=kind, base_path=tiny_llama_dir if width == 32 else None)
    config.quantization.double_quant = double_quant
    config.model.compute_dtype = str(dtype).removeprefix("torch.")
    live = load_run(run, config).model.get_base_model()
    full = AutoModelForCausalLM.from_pretrained(config.model.path)
    quantization = QuantizationConfig(kind=kind, double_quant=double_quant)
    checked = 0
    for path, module in live.named_modules():
        if is_quantised(module):
            weight = full.get_submodule(path.removesuffix(".base_layer")).weight.detach()
            trip, expected = RoundTrip(weight, quantization, dtype, torch.device("cpu")), dequantised_weight(module)
            assert torch.equal(trip.rows(0, len(weight)), expected)
            assert torch.equal(trip.rows(3, 7), expected[3:7])
            checked += 1
    assert checked == 28


def test_shards_index_and_files_beside_are_kept(make_run, tmp_path: Path) -> None:
    run, config = make_run(LoraConfig(r=4), dtype=torch.bfloat16)
    base = tmp_path / "sharded"
    shutil.copytree(config.model.path, base)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    (base / "notes.md").touch()
    config.model.path = str(base)
    result = export_run(run, config)
    folder = Path(result["path"])
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, folder))
    assert len(set(before["weight_map"].values())) > 2
    assert after == before
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (folder / "notes.md").exists()
    for name in set(before["weight_map"].values()):
        with safe_open(base / name, "pt") as old, safe_open(folder / name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            assert old.metadata() == new.metadata()
    config.export.dtype, config.export.path = "float32", str(tmp_path / "wide")
    export_run(run, config)
    wide = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    assert wide["metadata"]["total_size"] == 2 * before["metadata"]["total_size"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_files_of_a_bare_decoder(make_run, tmp_path: Path) -> None:
    # As GPT-2 lies on the hub: names without the prefix of the model with a head.
    run, config = make_run(LoraConfig(r=4), "gpt2")
    base = tmp_path / "bare"
    shutil.copytree(config.model.path, base)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config.model.path = str(base)
    result = export_run(run, config)
    assert result["fidelity"]["kl_mean"] < 1e-6
    assert load_file(Path(result["path"]) / "model.safetensors").keys() == tensors.keys()


def test_a_merge_that_changes_nothing_is_an_error(make_run) -> None:
    run, config = make_run(LoraConfig(r=4), dtype=torch.bfloat16)
    file = run.adapter / "adapter_model.safetensors"
    for factor in (0.0, 1e-8):  # nothing, and what bfloat16 cannot hold beside the weight
        tensors = {n: (t * factor if "lora_B" in n else t).contiguous() for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="changes no weight"):
            export_run(run, config)
    assert not (run.export / "merged").exists()


def test_rounding_is_measured(make_run) -> None:
    exact = export_run(*make_run(LoraConfig(r=4)))
    assert exact["rounding"] == 0.0
    run, config = make_run(LoraConfig(r=4), dtype=torch.bfloat16)
    rounded = export_run(run, config)
    assert 0.001 < rounded["rounding"] < 0.5
    assert rounded["fidelity"]["kl_mean"] > 0


def test_no_space_is_found_out_before_writing(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(LoraConfig(r=4))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("qmemtune.export.merged.shutil.disk_usage", lambda _: usage(1, 1, 1 << 20))
    monkeypatch.setattr("qmemtune.export.merged.write_shard", lambda *_: pytest.fail("written"))
    with pytest.raises(UserError, match="disk is too small"):
        export_run(run, config)
    assert list(run.export.iterdir()) == []


def test_a_wrong_byte_is_found(tmp_path: Path) -> None:
    values = torch.randn(64, 8).bfloat16()
    planned = [Planned("a.weight", values.dtype, (64, 8), lambda: iter(values.split(16)))]
    file = tmp_path / "model.safetensors"
    sums = write_shard(file, {"format": "pt"}, planned)
    assert torch.equal(load_file(file)["a.weight"], values)
    assert torch.equal(MappedShard(read_shard(file)).view("a.weight"), values)
    verify_shard(file, planned, sums)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunFailed, match=r"a\.weight was not written"):
        verify_shard(file, planned, sums)
    file.write_bytes(content[:-4])
    with pytest.raises(RunFailed, match="damaged"):
        verify_shard(file, planned, sums)


def test_large_models_are_merged_without_being_loaded(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = make_run(LoraConfig(r=4), kind="nf4", fidelity=False)
    monkeypatch.setattr("qmemtune.export.job.load_run", None)
    result = export_run(run, config)
    assert result["fidelity"] is None
    card = (Path(result["path"]) / "README.md").read_text()
    assert "**Not measured**: the check was switched off" in card
    written = json.loads((Path(result["path"]) / "fidelity.json").read_text())
    assert (written["measured"], written["reason"]) == (False, "switched off")


def test_anonymous_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A weight of 256 MB is updated: what is in memory are pieces of it."""
    shape = (16384, 8192)
    zeros = torch.zeros(1, dtype=torch.bfloat16).expand(shape)
    big = Planned(
        "big.weight", torch.bfloat16, shape, lambda: (zeros[i : i + 1024].clone() for i in range(0, 16384, 1024))
    )
    write_shard(tmp_path / "in.safetensors", {}, [big])
    shard = read_shard(tmp_path / "in.safetensors")
    mapped = MappedShard(shard)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def anonymous() -> int:
        text = Path(f"/proc/{process.pid}/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) << 10

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    before = anonymous()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()

    def pieces():
        weight = mapped.view("big.weight")
        for start in range(0, 16384, 512):
            yield (weight[start : start + 512].float() + 1).to(torch.bfloat16)

    out = [Planned("big.weight", torch.bfloat16, shape, pieces)]
    sums = write_shard(tmp_path / "out.safetensors", {}, out)
    verify_shard(tmp_path / "out.safetensors", out, sums)
    done.set()
    watcher.join()
    assert peak[0] - before < 256 << 20


def killed_export(path: Path, where: str) -> None:
    """An export whose process is killed; in a fork of this one, since importing takes seconds."""
    kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    if where == "sync":
        destination._on_disk = lambda _: kill()
    if where == "swap":
        rename = Path.rename
        Path.rename = lambda self, to: kill() if ".partial-" in self.name else rename(self, to)
    check_destination(path, force=True)
    with written_whole(path) as folder:
        (folder / "new").touch()
        if where == "inside":
            kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where", ["inside", "sync", "swap"])
def test_killed_at_any_moment_nothing_half_is_left(tmp_path: Path, where: str) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "qmemtune.json").write_text("{}")
    child = os.fork()
    if child == 0:
        try:
            killed_export(path, where)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (path / "new").exists()
    check_destination(path, force=True)
    assert [entry.name for entry in path.iterdir()] == ["qmemtune.json"]  # the earlier export, whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with written_whole(path) as folder:
        (folder / "new").touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]


def test_a_half_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    check_destination(tmp_path / "out", force=False)
    assert other.exists()
