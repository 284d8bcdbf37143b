"""Packed attention against plain masked attention, and what it does beside the stock one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistune.models import attention


def heads(count, tokens, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, tokens, width, generator=generator).to(dtype).requires_grad_()


def masked(query, key, value, lengths, window=None):
    """Block-diagonal causal attention by one dense mask: [1,H,T,d] -> [1,T,H,d]."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    distance = place[:, None] - place[None, :]
    seen = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window:
        seen &= distance < window
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[7], [1], [3, 3, 3], [5, 1, 1, 9, 2], [4, 4, 6, 4]])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_equals_masked(lengths, kv, window):
    inputs = [heads(4, sum(lengths)), heads(kv, sum(lengths), seed=1), heads(kv, sum(lengths), seed=2)]
    kinds = attention.segments(lengths, torch.device("cpu"))
    got, _ = attention.attend(nn.Module(), *inputs, None, segments=kinds, sliding_window=window)
    wanted = masked(*inputs, lengths, window)
    assert (got - wanted).abs().max() <= 1e-6
    weight = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        assert (mine - theirs).abs().max() <= 2e-6


@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [5, 1, 1, 9, 2]])
def test_segments_of_a_vision_tower_are_seen_whole(lengths):
    inputs = [heads(4, sum(lengths), seed=i) for i in range(3)]
    module = nn.Module()
    module.is_causal = False
    got, _ = attention.attend(module, *inputs, None, segments=attention.segments(lengths, torch.device("cpu")))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=owner[:, None] == owner[None, :]).transpose(1, 2)
    assert (got - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("packed", [True, False])
def test_half_precision_on_the_cpu_is_computed_in_fp32(packed):
    """The half kernels are slower there; autocast must not send the work back to them."""
    inputs = [heads(4, 12, dtype=torch.bfloat16, seed=i) for i in range(3)]
    kinds = attention.segments([12], torch.device("cpu")) if packed else None
    module = nn.Module()
    module.is_causal = True
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attention.attend(module, *inputs, None, segments=kinds)
    exact = masked(*(x.float() for x in inputs), [12])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.to(torch.bfloat16))


def test_segments_leave_out_empty_ones():
    kinds = attention.segments([3, 0, 2], torch.device("cpu"))
    assert kinds.lengths == (3, 2) and kinds.starts.tolist() == [0, 3, 5]
