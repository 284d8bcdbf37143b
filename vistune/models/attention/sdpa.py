"""Packed attention by torch's `scaled_dot_product_attention`, one call for each run of neighbours of equal length.

Runs on every device. On a CPU its flash kernel is called by name, forward and backward; elsewhere backward runs forward
again, since each device has operators of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vistune.models.attention.packs import Heads, Pack, differentiate

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def lacks(heads: Heads) -> str:
    return ""


def forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor | None]:
    if q.device.type != "cpu":
        return attend(q, k, v, pack), None
    outs, kept = [], []
    for run, *heads in _runs(pack.lengths, q, k, v):
        mask, causal = _mask(run, pack, q)
        out, logsumexp = _forward(*heads, 0.0, causal, attn_mask=mask, scale=pack.scale)
        outs.append(_row(out))
        kept.append(_row(logsumexp))
    return _joined(outs), _joined(kept)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type != "cpu":
        return differentiate(lambda q, k, v: attend(q, k, v, pack), grad, q, k, v)
    kept = kept.view(q.shape[:2])  # as forward laid it: [T, H]
    found = []
    for run, grad_out, *saved, logsumexp in _runs(pack.lengths, grad, q, k, v, out, kept):
        mask, causal = _mask(run, pack, q)
        found.append(_backward(grad_out, *saved, logsumexp, 0.0, causal, attn_mask=mask, scale=pack.scale))
    dq, dk, dv = ([_row(each) for each in of] for of in zip(*found, strict=True))
    return _joined(dq), _joined(dk), _joined(dv)


def attend(q: Tensor, k: Tensor, v: Tensor, pack: Pack, dropout: float = 0.0) -> Tensor:
    """The same through autograd, with dropout of the scores: [T,H,d] -> [T,H,d]."""
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for run, query, key, value in _runs(pack.lengths, q, k, v):
            mask, causal = _mask(run, pack, q)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, mask, dropout, causal, scale=pack.scale, enable_gqa=grouped
            )
            outs.append(_row(out))
    return _joined(outs)


def _runs(lengths: Sequence[int], *rows: Tensor) -> Iterator[tuple]:
    """(length, count) of each run of equal neighbours with its part of each row: [T,h,...] -> [count,h,length,...]."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the backward of n slices fills n whole gradients with zeros.
    for run, *parts in zip(runs, *(row.split(sizes) for row in rows), strict=True):
        yield run[0], *(part.unflatten(0, (run[1], run[0])).transpose(1, 2) for part in parts)


def _row(heads: Tensor) -> Tensor:
    """[count,h,length,...] -> [count * length,h,...]."""
    return heads.transpose(1, 2).flatten(0, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _mask(length: int, pack: Pack, like: Tensor) -> tuple[Tensor | None, bool]:
    """What is added to a sample's scores, and whether the kernel is to look back only."""
    if pack.window is None or pack.window >= length:
        return None, pack.causal
    place = torch.arange(length, device=like.device)
    distance = place[:, None] - place[None, :]
    hidden = (distance < 0) | (distance >= pack.window)  # as `transformers` counts a window: the position itself is 1
    return like.new_zeros(length, length).masked_fill_(hidden, float("-inf")), False
