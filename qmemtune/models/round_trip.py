"""What a quantised base computes with, one weight at a time and a few rows at a time: quantised and dequantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qmemtune.config.model import QuantizationConfig

BLOCK = 64
"""Values that share a 4-bit scale: bitsandbytes' default."""
SCALES_BLOCK = 256
"""Scales that are quantised together with double quantisation."""
CHUNK = 1 << 22
"""Values in work at once."""


class RoundTrip:
    """A weight as a quantised layer sees it, without the layer.

    The values are those of :func:`~qmemtune.models.bitsandbytes.dequantised_weight` on a layer that was loaded from
    the same file, bit for bit, on the same kind of device. In memory are the packed weight and the rows asked for.

    Args:
        weight: (out_features, in_features), of any float type, on the CPU.
        quantization: 4-bit or 8-bit.
        dtype: the compute dtype: what ``from_pretrained`` casts the weight to before it is quantised.
        device: where the live model quantises.
    """

    def __init__(
        self, weight: Tensor, quantization: QuantizationConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weight, self.quantization, self.dtype, self.device = weight, quantization, dtype, device
        if quantization.kind != "int8":
            self._quantise()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the dequantised weight, float32, on the CPU."""
        if self.quantization.kind == "int8":
            return self._int8(self.weight[start:stop])
        if self._columns % BLOCK:
            # Blocks reach over the ends of rows, which bitsandbytes' CPU kernel takes in a way of its own: ask it for
            # the whole weight, as the layer does.
            return self._dequantise(0, len(self.weight))[start:stop].float().cpu()
        return self._dequantise(start, stop).float().cpu()

    def _int8(self, rows: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        # The detour over the compute dtype and float16 is what a loaded layer goes through.
        values, scales, _ = int8_vectorwise_quant(rows.to(self.device, self.dtype).half().contiguous())
        return (values.float() * (scales.float() / 127.0).view(-1, 1)).cpu()

    def _quantise(self) -> None:
        """Pack the weight. Blocks are independent of each other, only the scales are quantised as a whole."""
        from bitsandbytes.functional import dequantize_blockwise, quantize_4bit, quantize_blockwise

        self._columns = self.weight.shape[1]
        flat = self.weight.reshape(-1)
        packed, scales = [], []
        for start in range(0, flat.numel(), CHUNK):
            chunk = flat[start : start + CHUNK].to(self.device, self.dtype)
            values, state = quantize_4bit(
                chunk, blocksize=BLOCK, compress_statistics=False, quant_type=self.quantization.kind
            )
            packed.append(values.flatten())
            scales.append(state.absmax)
        self._packed, absmax = torch.cat(packed), torch.cat(scales)
        if self.quantization.double_quant:
            offset = absmax.mean()
            codes, statistics = quantize_blockwise(absmax - offset, blocksize=SCALES_BLOCK)
            absmax = dequantize_blockwise(codes, statistics) + offset
        self._absmax = absmax

    def _dequantise(self, start: int, stop: int) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        low, high = start * self._columns, stop * self._columns
        state: Any = QuantState(
            absmax=self._absmax[low // BLOCK : -(-high // BLOCK)],
            shape=torch.Size((stop - start, self._columns)),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type=self.quantization.kind,
        )
        values: Tensor = dequantize_4bit(self._packed[low // 2 : -(-high // 2)].view(-1, 1), state)
        return values
