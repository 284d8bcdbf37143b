"""Packed attention by FlexAttention: blocks of the scores that no sample needs are never computed.

Which blocks those are follows from the samples' starts; a mask of single positions is never built. Its backward runs
forward again, since it is reached through autograd alone. For devices, types and widths that `varlen` lacks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from vistune.models.attention.packs import Heads, Pack, differentiate

BLOCK = 128
_masks = WeakTensorKeyDictionary()


def lacks(heads: Heads) -> str:
    return "it has no backward on CPUs" if heads.device.type == "cpu" else ""


def forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor | None]:
    return _attend(q, k, v, pack), None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    return differentiate(lambda q, k, v: _attend(q, k, v, pack), grad, q, k, v)


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    heads = [each.transpose(0, 1).unsqueeze(0) for each in (q, k, v)]
    out = _compiled()(*heads, block_mask=_mask(pack, len(q)), scale=pack.scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _mask(pack: Pack, tokens: int) -> BlockMask:
    """The mask of a pack, made once for all layers that attend in the same way."""
    made = _masks.setdefault(pack.starts, {})
    key = (tokens, pack.causal, pack.window)
    if key not in made:
        made[key] = block_mask(pack, tokens)
    return made[key]


def block_mask(pack: Pack, tokens: int) -> BlockMask:
    """Which blocks of 128 x 128 scores are computed whole, which in part. The host does not wait for the device.

    Every query's keys are neighbours [first, last], so a row of blocks needs neighbouring blocks too.
    """
    place = torch.arange(tokens, device=pack.starts.device, dtype=torch.int32)
    owner = torch.searchsorted(pack.starts[1:-1], place, right=True)
    first, last = pack.starts[owner], pack.starts[owner + 1] - 1
    if pack.window is not None:
        first = torch.maximum(first, place - (pack.window - 1))
    if pack.causal:
        last = place
    blocks = -(-tokens // BLOCK)
    (some_first, all_first), (all_last, some_last) = _bounds(first, blocks), _bounds(last, blocks)
    block = torch.arange(blocks, device=place.device, dtype=torch.int32)
    begin, end = block * BLOCK, block * BLOCK + BLOCK - 1
    needed = (end[None] >= some_first[:, None]) & (begin[None] <= some_last[:, None])
    whole = (begin[None] >= all_first[:, None]) & (end[None] <= all_last[:, None]) & (end[:, None] < tokens)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= last[query])

    return BlockMask.from_kv_blocks(
        *_listed(needed & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def _bounds(of: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest value in each block of a row; the row's last value fills the last block up."""
    full = torch.cat([of, of[-1:].expand(blocks * BLOCK - len(of))]).view(blocks, BLOCK)
    return full.amin(1), full.amax(1)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are chosen, and which, those first: int32 [1,1,rows] and [1,1,rows,columns]."""
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]
