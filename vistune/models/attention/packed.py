"""Packed attention as one operator, `vistune::packed_attention`: what autograd, `torch.compile`, activation
checkpointing and fake tensors see of it, whichever kernel computes it. Kept for backward: q, k, v, the result, and
T * H numbers of the kernel's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from vistune.models.attention import choice
from vistune.models.attention.packs import Heads, Pack

torch.library.define(
    "vistune::packed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor host, float scale, bool causal, int window)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "vistune::packed_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor kept, Tensor starts, Tensor host, float scale,"
    " bool causal, int window) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("vistune::packed_attention", "default")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, host: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    pack = _pack(starts, host, scale, causal, window)
    out, kept = choice.kernel(_heads(q, k, pack)).forward(q, k, v, pack)
    if kept is None:
        kept = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    return out.contiguous(), kept.view(q.shape[1], q.shape[0])


@torch.library.register_fake("vistune::packed_attention")
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, host: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.impl("vistune::packed_attention_backward", "default")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: Tensor,
    starts: Tensor,
    host: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    pack = _pack(starts, host, scale, causal, window)
    dq, dk, dv = choice.kernel(_heads(q, k, pack)).backward(grad, q, k, v, out, kept, pack)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.register_fake("vistune::packed_attention_backward")
def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, host, *how = inputs
    ctx.save_for_backward(q, k, v, *output, starts, host)
    ctx.how = how


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    found = torch.ops.vistune.packed_attention_backward(grad, *ctx.saved_tensors, *ctx.how)
    return (*found, None, None, None, None, None)


torch.library.register_autograd("vistune::packed_attention", _differentiate, setup_context=_keep)


_operators: Any = torch.ops.vistune


@register_flop_formula(_operators.packed_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, host: Tensor, *_: Any, **__: Any) -> int:
    """As torch counts its own attention: whole squares, whether or not it looks back only. A fake pack counts as one
    sample, since it has no lengths."""
    lengths = [len(q)] if isinstance(host, FakeTensor) else host.diff().tolist()
    return 4 * sum(length**2 for length in lengths) * q.shape[1] * q.shape[2]


@register_flop_formula(_operators.packed_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, *more: Any, **_: Any
) -> int:
    """Twice forward's; the scores that a kernel computes again are not counted."""
    return 2 * _forward_flops(q, k, v, *more)


def _pack(starts: Tensor, host: Tensor, scale: float, causal: bool, window: int) -> Pack:
    ends = host.tolist()
    lengths = tuple(after - before for before, after in itertools.pairwise(ends))
    limited = 0 < window < max(lengths, default=0)
    return Pack(starts, lengths, scale, causal, window if limited else None)


def _heads(q: Tensor, k: Tensor, pack: Pack) -> Heads:
    group = q.shape[1] // k.shape[1]
    return Heads(q.device, q.dtype, q.shape[2], group, pack.causal, pack.window is not None)


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, host: Tensor, how: tuple[float, bool, int]) -> Tensor:
    """[T,H,d], [T,K,d], [T,K,d] -> [T,H,d]; `how` is scale, whether causal, and the window (0: none)."""
    out: Tensor = torch.ops.vistune.packed_attention(q, k, v, starts, host, *how)[0]
    return out
