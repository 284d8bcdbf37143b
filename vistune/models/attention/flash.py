"""Packed attention by the flash-attn package, where somebody installed it. Its backward runs forward again: the name of
its own backward changes between releases, the name used here does not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from vistune.models.attention.packs import Heads, Pack, differentiate


def lacks(heads: Heads) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if heads.device.type == "cpu":
        return "it has no kernel for CPUs"
    if heads.dtype not in (torch.bfloat16, torch.float16):
        return "it computes in bf16 or fp16"
    return ""


def forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor | None]:
    return _attend(q, k, v, pack), None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    return differentiate(lambda q, k, v: _attend(q, k, v, pack), grad, q, k, v)


@functools.cache
def _function() -> Any:
    return importlib.import_module("flash_attn").flash_attn_varlen_func


def _attend(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    window = (-1 if pack.window is None else pack.window - 1, 0 if pack.causal else -1)
    starts, longest = pack.starts, pack.longest
    found: Tensor = _function()(
        q, k, v, starts, starts, longest, longest, softmax_scale=pack.scale, causal=pack.causal, window_size=window
    )
    return found
