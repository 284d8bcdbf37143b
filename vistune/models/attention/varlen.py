"""Packed attention by torch's own flash attention over rows of any lengths, the operators behind
`torch.nn.attention.varlen`. CUDA and its like, half precision, windows too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistune.models.attention.packs import Heads, Pack


def lacks(heads: Heads) -> str:
    if heads.device.type == "cpu":
        return "torch has it for accelerators only"
    if heads.dtype not in (torch.bfloat16, torch.float16):
        return "it computes in bf16 or fp16"
    return ""


def forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor | None]:
    found = torch.ops.aten._flash_attention_forward(q, k, v, *_rows(pack), 0.0, pack.causal, False, **_how(pack))
    out, logsumexp = found[:2]
    assert logsumexp.shape == (q.shape[1], q.shape[0]), f"logsumexp {tuple(logsumexp.shape)}"
    return out, logsumexp


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    # The state of random numbers is dropout's, of which there is none.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, kept, *_rows(pack), 0.0, pack.causal, state, unused, **_how(pack)
    )
    return dq, dk, dv


def _rows(pack: Pack) -> tuple[Tensor, Tensor, int, int]:
    return pack.starts, pack.starts, pack.longest, pack.longest


def _how(pack: Pack) -> dict:
    """`window` counts the position itself, torch only those before it; -1 is no limit."""
    left = -1 if pack.window is None else pack.window - 1
    return {"scale": pack.scale, "window_size_left": left, "window_size_right": 0 if pack.causal else -1}
