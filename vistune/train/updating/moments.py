"""A moment of AdamW as it is kept between updates: in fp32, or in 8 bits with a scale for each block of a row.

Blocks never cross a row, and shards are rows: the codes are the same on any number of ranks. Knows no update.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.models import lowbit
from vistune.train.spreading import parallel

BLOCKS = (256, 128, 64)
"""Values that share a scale: 256 as bitsandbytes has it, fewer where a row is no multiple of that."""
SMALL = 4096
"""Tensors with fewer values keep fp32 moments, as bitsandbytes has it."""


class Whole:
    """A moment in fp32, updated where it is. `weight` is what this rank holds of the parameter."""

    bits = 32

    def __init__(self, weight: Tensor):
        self.values = torch.zeros_like(weight, dtype=torch.float32)

    def read(self, rows: slice) -> Tensor:
        """fp32 values of these rows: a view."""
        return part(self.values, rows)

    def keep(self, rows: slice, values: Tensor, skip: Tensor | None) -> None:
        """Nothing to do: `values` are what `read` gave."""

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """What a checkpoint holds, laid out over the ranks as the parameter `like`; suffix -> tensor."""
        return {"": parallel.spread(self.values, like)}


class Blocks:
    """A moment in 8 bits: a code [rows, ...] per value, a scale [rows, blocks of a row] in fp32."""

    bits = 8

    def __init__(self, weight: Tensor, signed: bool):
        self.width = weight.shape[1:].numel()
        self.block = block_of(self.width)
        self.map = dynamic_map(signed, weight.device)
        self.codes = torch.zeros_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
        each = -(-self.width // self.block)
        self.scales = torch.zeros(weight.shape[0], each, dtype=torch.float32, device=weight.device)

    def read(self, rows: slice) -> Tensor:
        """fp32 values of these rows, in a tensor of their own."""
        codes, scales = self.codes[rows], self.scales[rows]
        padded = self._padded(codes.reshape(len(codes), self.width))
        values = _library().dequantize_blockwise(padded, absmax=scales.reshape(-1), code=self.map, blocksize=self.block)
        return values.view(padded.shape)[:, : self.width].reshape(codes.shape)

    def keep(self, rows: slice, values: Tensor, skip: Tensor | None) -> None:
        """Quantise `values` [rows, ...]; with `skip` 1 what was kept stays to the bit."""
        codes, scales = self.codes[rows], self.scales[rows]
        padded = self._padded(values.reshape(len(codes), self.width))
        made, said = _library().quantize_blockwise(padded, code=self.map, blocksize=self.block)
        made = made.view(padded.shape)[:, : self.width].reshape(codes.shape)
        absmax = said.absmax.view_as(scales)
        if skip is not None:
            made, absmax = torch.where(skip > 0, codes, made), torch.where(skip > 0, scales, absmax)
        codes.copy_(made)
        scales.copy_(absmax)

    def _padded(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, -self.width % self.block)).contiguous()

    def state(self, like: Tensor) -> dict[str, Tensor]:
        return {
            "": parallel.spread(self.codes, like),
            "_scale": parallel.spread(self.scales, like, self.scales.shape[1]),
        }


def part(tensor: Tensor, rows: slice) -> Tensor:
    """Those rows of a tensor, as a view; all of one that has none."""
    return tensor[rows] if tensor.ndim else tensor


def eight(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits: matrices that are not small, counted whole."""
    return parameter.ndim > 1 and parameter.numel() >= SMALL


def block_of(width: int) -> int:
    """Values of a row of `width` that share a scale."""
    exact = [block for block in BLOCKS if width % block == 0]
    return exact[0] if exact else min((block for block in BLOCKS if block >= width), default=BLOCKS[0])


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that codes stand for (arXiv 2110.02861, section 2.2): fp32, from -1 or 0 to 1."""
    return _library().create_dynamic_map(signed=signed).to(device)


@cache
def _library() -> Any:
    """bitsandbytes' functions. ValueError, with what to install, where it is absent or does not load."""
    try:
        return lowbit.library().functional
    except ValueError as error:
        raise ValueError(f"optimizer.name = adamw8bit: {str(error).removeprefix('quantize: ')}") from error
