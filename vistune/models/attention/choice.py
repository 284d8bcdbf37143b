"""Which kernel computes packed attention: the first of them that proves on this device, forward and backward, that its
numbers are right; or the one that was asked for.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vistune import console
from vistune.models.attention import flash, flex, sdpa, varlen
from vistune.models.attention.packs import Heads, Kernel, Pack, differentiate

KERNELS: dict[str, Kernel] = {
    name: cast(Kernel, module)
    for name, module in (("varlen", varlen), ("flash", flash), ("flex", flex), ("sdpa", sdpa))
}
"""By name, the fastest first."""
_LENGTHS = (5, 3, 9, 130)
"""Samples of the trial: short ones, and one longer than a block of any kernel."""
_WINDOW = 4

_wanted = "auto"


class Choice(NamedTuple):
    """The kernel's name, and why each one before it was passed over."""

    name: str
    others: dict[str, str]


def prefer(kernel: str) -> None:
    """From here on `kernel` is asked for: a name of KERNELS, or "auto"."""
    global _wanted
    assert kernel == "auto" or kernel in KERNELS, kernel
    _wanted = kernel


def chosen(heads: Heads, kernel: str = "") -> Choice:
    """What computes such heads where `kernel` (empty: what `prefer` was told) is asked for.

    ValueError when it was asked for by name and does not run here, with the reason.
    """
    return _chosen(heads, kernel or _wanted)


def kernel(heads: Heads) -> Kernel:
    """The module that computes such heads; said in a line where it is asked for the first time."""
    return _said(heads, _wanted)


@functools.lru_cache(maxsize=256)
def _said(heads: Heads, wanted: str) -> Kernel:
    name, others = _chosen(heads, wanted)
    passed = "; ".join(f"not {other}: {why}" for other, why in others.items()) if heads.device.type != "cpu" else ""
    console.say(f"attention of packs: {name} ({heads}){'; ' + passed if passed else ''}")
    return KERNELS[name]


@functools.lru_cache(maxsize=256)
def _chosen(heads: Heads, wanted: str) -> Choice:
    others: dict[str, str] = {}
    for name, tried in KERNELS.items():
        if wanted not in ("auto", name):
            continue
        why = tried.lacks(heads) or _fails(tried, heads)
        if not why:
            return Choice(name, others)
        others[name] = why
    if wanted == "auto":
        raise ValueError(f"no kernel computes packed attention here ({heads}): {others}")
    raise ValueError(
        f"train.attention = {wanted}: it does not run here ({heads}): {others[wanted]}; set train.attention = auto"
    )


def _fails(tried: Kernel, heads: Heads) -> str:
    """Why the kernel's result or gradients are not what they should be, tried on a few tokens; empty when they are.

    In a thread of its own: the first pack may come while a layer is computed twice, which watches every operator and
    every tensor that is kept for backward.
    """
    try:
        with ThreadPoolExecutor(1) as alone:
            worst = alone.submit(_error, tried, heads).result()
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
        AssertionError,
    ) as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
    return "" if worst <= _tolerance(heads.dtype) else f"its numbers are off by {worst:.2g} of the largest"


def _tolerance(dtype: torch.dtype) -> float:
    """Of the largest value. fp32 may be multiplied as tf32 (10 bits), here and in what it is held against."""
    return {torch.bfloat16: 4e-2, torch.float16: 1e-2}.get(dtype, 1e-2)


@torch.no_grad()
def _error(tried: Kernel, heads: Heads) -> float:
    """The largest difference to per-sample attention in fp32, over the result and all gradients."""
    if heads.device.type != "cpu":
        torch.accelerator.set_device_index(heads.device.index or 0)  # each thread has its own
    generator = torch.Generator().manual_seed(0)
    tokens = sum(_LENGTHS)

    def made(count: int) -> Tensor:
        return torch.randn(tokens, count, heads.width, generator=generator).to(heads.device, heads.dtype)

    q, k, v, grad = made(2 * heads.group), made(2), made(2), made(2 * heads.group)
    pack = _trial(heads)
    out, kept = tried.forward(q, k, v, pack)
    kept = out.new_zeros(q.shape[:2], dtype=torch.float32) if kept is None else kept
    found = (out, *tried.backward(grad, q, k, v, out, kept, pack))
    exact = grad.float(), q.float(), k.float(), v.float()
    wanted = (
        sdpa.attend(exact[1], exact[2], exact[3], pack),
        *differentiate(lambda q, k, v: sdpa.attend(q, k, v, pack), *exact),
    )
    return max(
        float((one.float() - other).abs().amax() / other.abs().amax()) for one, other in zip(found, wanted, strict=True)
    )


def _trial(heads: Heads) -> Pack:
    starts = torch.tensor([0, *_LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(heads.device)
    window: Any = _WINDOW if heads.windowed else None
    return Pack(starts, _LENGTHS, heads.width**-0.5, heads.causal, window)
