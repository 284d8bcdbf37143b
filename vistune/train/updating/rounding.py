"""fp32 values rounded to bf16 stochastically, the noise a function of seed, step, name and element alone: the same
rounding on any number of ranks, any split and any device. Knows no optimizer.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.bfloat16).max
"""Beyond it, and for what is no number, nothing is drawn: the nearest bf16 is taken."""
MIX = (0x7FEB352D, 0x846CA68B)
"""Factors of the hash "lowbias32" (C. Wellons, Prospecting for Hash Functions, 2018)."""
WORD = 1 << 32


def key(seed: int, step: int, name: str) -> tuple[int, int]:
    """Two 32-bit words, the first odd, for one update of one parameter."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little") | 1, int.from_bytes(digest[4:], "little")


def number(out: Tensor, first: int, key: tuple[int, int]) -> None:
    """Fill int32 `out` [N] with what `mix` turns into noise for the elements `first`, `first + 1`, ... of a whole
    tensor: element * key[0] + key[1], modulo 2**32."""
    torch.arange(len(out), dtype=torch.int32, device=out.device, out=out)
    out.mul_(_signed(key[0])).add_(_signed(first * key[0] + key[1]))


def mix(numbers: Tensor) -> Tensor:
    """int32 [N] in, the same tensor out, as noise: uniform over 0 .. 65535. Its old content is gone."""
    numbers.bitwise_xor_(_shifted(numbers, 16)).mul_(_signed(MIX[0]))
    numbers.bitwise_xor_(_shifted(numbers, 15)).mul_(_signed(MIX[1]))
    return numbers.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def to_bf16(values: Tensor, noise: Tensor) -> Tensor:
    """bf16 neighbours of fp32 `values`: the one further from zero where the 16 bits that are cut, plus `noise` (int32,
    0 .. 65535, same shape), carry over. With uniform noise the mean is the value; what bf16 can hold stays as it is."""
    cut = values.view(torch.int32).add(noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(values.abs() <= LARGEST, cut, values).to(torch.bfloat16)


def rounded(values: Tensor, seed: int, step: int, name: str, first: int = 0) -> Tensor:
    """fp32 `values` as bf16, of the tensor `name` in update `step`; they begin at its element `first`."""
    noise = torch.empty(values.numel(), dtype=torch.int32, device=values.device)
    number(noise, first, key(seed, step, name))
    return to_bf16(values.contiguous(), mix(noise).view(values.shape))


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifted right as if they had no sign."""
    return numbers.bitwise_right_shift(bits).bitwise_and_((1 << 32 - bits) - 1)


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    word %= WORD
    return word - WORD if word >= WORD // 2 else word
