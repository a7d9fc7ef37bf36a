"""A plain Hugging Face folder: the base model with a LoRA's update added to its weights, streamed from file to file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.errors import UserError
from qmemtune.export.basefiles import BaseFiles, open_base
from qmemtune.export.changed_base import changed_base
from qmemtune.export.shards import MappedShard, Planned, Shard, Stored, verify_shard, write_shard
from qmemtune.export.updates import Rows, Update, read_updates
from qmemtune.models.layout import Layout, read_layout
from qmemtune.models.round_trip import RoundTrip
from qmemtune.models.sources import Source
from qmemtune.models.threads import torch_threads

PIECE = 1 << 19
"""Values in work at once: few enough to stay in a processor's cache from reading to writing."""
SLACK = 64 << 20
"""Bytes that must stay free on the disk: for tokenizer, card and the file system's own."""

Base = Literal["dequantized", "original"]


@dataclass
class Merge:
    """One merge: what goes in, and what is found on the way."""

    source: Source
    """The base model's."""
    model: ModelConfig
    quantization: QuantizationConfig
    lora: Path
    """A PEFT LoRA folder."""
    compute_dtype: torch.dtype
    """The run's, and where it ran: what a quantised base computes with depends on both."""
    device: torch.device
    base: Base = "dequantized"
    """What is merged into: the weights that a quantised run computed with, or those of the base's files."""
    dtype: torch.dtype | None = None
    """Of the written weights; each tensor keeps its own if not given."""
    written: set[torch.dtype] = field(default_factory=set)
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Of the rounding of merged weights, and of their update, over one piece of each."""
    changed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, folder: Path, *, keep_tokenizer: bool) -> dict[str, Any]:
        """Write the merged model.

        Every weight that the run kept quantised is written dequantised, adapted or not, if ``base`` says so: that is
        the weight the adapter was trained beside. All other tensors are those of the base's files, in the same files.

        Args:
            keep_tokenizer: copy the base's tokenizer too.

        Returns:
            ``dtype``, ``rounding`` (size of the rounding of the merged weights relative to the update's), ``seconds``.

        Raises:
            UserError: the base cannot be merged into, the disk is too small, or no weight would change.
            RunFailed: what was written is not what was computed.
        """
        files = open_base(self.source)
        layout = read_layout(self.model, self.quantization, self.source, self.compute_dtype)
        shards, untied = self._plan(files, layout)
        check_space(folder, sum(tensor.size for _, tensors in shards for tensor in tensors))
        start = time.perf_counter()
        # The thread that writes needs a core too: torch's threads wait for each other wherever one of theirs is taken.
        with torch_threads(torch.get_num_threads() - 1):
            sums = {
                shard.path.name: write_shard(folder / shard.path.name, shard.metadata, tensors)
                for shard, tensors in shards
            }
        if not self.changed:
            raise UserError(
                "the merge changes no weight: the update is zero, or lost in rounding",
                where=str(self.lora),
                fix="train the adapter, or write export.dtype=float32",
            )
        every = [(shard.path.name, tensor) for shard, tensors in shards for tensor in tensors]
        files.write_index(folder, {t.name: t.size for _, t in every}, {t.name: name for name, t in every})
        files.write_config(folder, dtype=self.dtype, untied=untied)
        files.copy_beside(folder, tokenizer=keep_tokenizer)
        self.seconds["write"] = time.perf_counter() - start
        start = time.perf_counter()
        for shard, tensors in shards:
            verify_shard(folder / shard.path.name, tensors, sums[shard.path.name])
        self.seconds["verify"] = time.perf_counter() - start
        rounding, update = self.squares
        return {
            "dtype": " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.written)),
            "rounding": (rounding / update) ** 0.5 if update else 0.0,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def _plan(self, files: BaseFiles, layout: Layout) -> tuple[list[tuple[Shard, list[Planned]]], bool]:
        """What each file is to hold, and whether a tied output head gets weights of its own."""
        updates = read_updates(self.lora)
        names = layout.names(files.names)
        stored = {name: weight for weight, name in names.items()}
        heads: dict[str, str] = {}
        for path in updates:
            weight = f"{path}.weight"
            if not layout.is_linear(path):
                raise UserError(f"the base model has no linear layer {path}", where=str(self.lora))
            if weight in layout.tied:
                # An update of a tied head must not reach the input embeddings.
                heads[names[layout.tied[weight]]] = path
            elif weight not in names:
                raise UserError(
                    f"{path} is not one tensor in the files of {self.source.origin}, so nothing can be added to it",
                    where="export.format",
                    fix="use export.format=lora or live, or leave that layer out of the training",
                )
        shards = []
        for shard in files.shards:
            mapped, tensors = MappedShard(shard), []
            for entry in shard.tensors:
                path = stored.get(entry.name, "").removesuffix(".weight")
                if f"{path}.weight" in layout.tied and path in updates:
                    continue  # a copy of the tied weight, which loading ignores
                tensors.append(self._planned(mapped, entry, path, updates.get(path), layout))
                if entry.name in heads:
                    head = heads[entry.name]
                    renamed = replace(self._planned(mapped, entry, head, updates[head], layout), name=f"{head}.weight")
                    tensors.append(renamed)
            shards.append((shard, tensors))
        return shards, bool(heads)

    def _planned(self, mapped: MappedShard, entry: Stored, path: str, update: Update | None, layout: Layout) -> Planned:
        dtype = self.dtype if self.dtype is not None and entry.dtype.is_floating_point else entry.dtype
        if entry.dtype.is_floating_point:
            self.written.add(dtype)
        dequantised = self.base == "dequantized" and path in layout.quantised
        if update is None and not dequantised:
            return Planned(entry.name, dtype, entry.shape, lambda: cast(mapped.view(entry.name), dtype))
        transposed = layout.is_transposed(path)
        if update is not None:
            shape = (update.lora_B.shape[0], update.lora_A.shape[1])
            if entry.shape != (shape[::-1] if transposed else shape):
                raise UserError(f"the update of {path} does not fit: {entry.shape} and {shape}", where=str(self.lora))

        def pieces() -> Iterator[Tensor]:
            weight = mapped.view(entry.name)
            base = self._base(weight, path, transposed, layout, update)
            yield from self._merged(base, entry.shape, update, dtype, transposed)

        return Planned(entry.name, dtype, entry.shape, pieces)

    def _base(self, weight: Tensor, path: str, transposed: bool, layout: Layout, update: Update | None) -> Rows:
        """Rows of the weight that the update is added to, float32, laid out as in the file."""
        if update is not None:
            changed = changed_base(weight, self.lora, self.compute_dtype, transposed=transposed)
            if changed is not None:
                return lambda start, stop: changed[start:stop].clone()
        if self.base == "original" or path not in layout.quantised:
            return lambda start, stop: weight[start:stop].to(torch.float32, copy=True)
        if not transposed:
            return RoundTrip(weight, self.quantization, self.compute_dtype, self.device).rows
        trip = RoundTrip(weight.T.contiguous(), self.quantization, self.compute_dtype, self.device)
        whole = trip.rows(0, weight.shape[1]).T
        return lambda start, stop: whole[start:stop].clone()

    def _merged(
        self, base: Rows, shape: tuple[int, ...], update: Update | None, dtype: torch.dtype, transposed: bool
    ) -> Iterator[Tensor]:
        count, step = shape[0], max(1, PIECE // max(1, shape[1]))
        rows, middle = base, count // 2 // step * step
        if update is not None:
            lengths = None
            if transposed and update.magnitude is not None:
                lengths = update.lengths(base, count, step)
            rows = update.merged(base, transposed=transposed, lengths=lengths)
        for start in range(0, count, step):
            stop = min(start + step, count)
            exact = rows(start, stop)
            piece = exact.to(dtype)
            if update is not None and (start == middle or not self.changed):
                before = base(start, stop)
                self.changed = self.changed or not torch.equal(piece, before.to(dtype))
                self.squares[0] += float((piece.float() - exact).square().sum())
                self.squares[1] += float((exact - before).square().sum())
            yield piece


def cast(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A weight in pieces; in its own data type nothing is copied."""
    flat = weight.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE].to(dtype)


def check_space(folder: Path, needed: int) -> None:
    """See before writing whether the disk has room.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SLACK:
        raise UserError(
            f"the disk is too small: {needed / 1e9:,.2f} GB are to be written, {free / 1e9:,.2f} GB are free",
            where=str(folder.parent),
            fix="choose another export.path, or make room",
        )
