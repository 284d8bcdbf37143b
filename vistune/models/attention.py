"""Attention over a pack: several samples in one row, none of which sees another.

Registered with `transformers` as "vistune_packed". A forward that is given `segments` attends inside each of them; one
that is not behaves as the stock "sdpa" (masks included), so the same model packs in training and generates.
Knows nothing of models or of what the segments hold.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older torch, or one built without it: per-segment attention serves
    varlen_attn = None  # type: ignore[assignment]

NAME = "vistune_packed"


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples of a pack begin and end: `lengths` on the host, their running sum int32 [S+1] on the device."""

    lengths: tuple[int, ...]
    starts: Tensor
    longest: int


def segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """Describe a pack by its samples' lengths, in order; zeros are left out. The host does not wait for the device."""
    kept = tuple(length for length in lengths if length)
    starts = torch.tensor([0, *itertools.accumulate(kept)], dtype=torch.int32)
    starts = starts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else starts.to(device)
    return Segments(kept, starts, max(kept, default=0))


def use(model: PreTrainedModel) -> None:
    """Make `model` and its sub-models attend with this module. Costs nothing when they already do."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


def no_mask(like: Tensor) -> Tensor:
    """What to pass as `attention_mask` beside `segments`.

    `transformers` hands a 4-D mask through untouched; without one it would compare positions on the host, which makes
    the host wait for the device.
    """
    return like.new_empty(1, 1, 0, 0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function `transformers` calls: query [B,H,T,d], key and value [B,K,T,d] -> [B,T,H,d]. Packs have B = 1.

    `module.is_causal` False: every position of a segment sees the whole segment, as in a vision tower.
    """
    if segments is None:
        return _stock(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    assert query.shape[0] == 1, "a pack is one row"
    window = sliding_window if sliding_window is not None and sliding_window < segments.longest else None
    causal = bool(getattr(module, "is_causal", True))
    assert causal or window is None, "a sliding window looks back only"
    if dropout == 0.0 and _has_varlen(query.device, query.dtype, query.shape[-1], query.shape[1] // key.shape[1]):
        return _varlen(query, key, value, segments, scaling, window, causal), None
    return _per_segment(query, key, value, segments, scaling, window, causal, dropout), None


def _stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    **kwargs: Any,
) -> Tensor:
    """Stock sdpa, in fp32 where that is the faster kernel."""
    if not _upcast(query):
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scale, **kwargs)[0]
    with torch.autocast("cpu", enabled=False):
        q, k, v = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scale, **kwargs)[0].to(query.dtype)


def _upcast(query: Tensor) -> bool:
    """The CPU's bf16 kernel took 2 to 4 times the fp32 one's time (torch 2.13, AVX512 without bf16 instructions)."""
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """One sdpa call for each run of neighbours of equal length."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(segments.lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the backward of n slices fills n whole gradients with zeros.
    pieces = zip(runs, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outs = [_run(q, k, v, length, count, scale, window, causal, dropout) for (length, count), q, k, v in pieces]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    count: int,
    scale: float | None,
    window: int | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """`count` segments of `length`: [1,H,count*length,d] -> [1,count*length,H,d]."""
    q, k, v = (x.squeeze(0).unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
    banded = window is not None and window < length
    mask = _band(length, window, q.device) if banded and window is not None else None
    grouped = q.shape[1] != k.shape[1]
    causal = causal and not banded
    if _upcast(query):
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), mask, dropout, causal, scale=scale, enable_gqa=grouped
            ).to(query.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True where query i may see key j: j <= i and i - j < window, as `transformers` counts a sliding window."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    starts, longest = segments.starts, segments.longest
    return _call_varlen(q, k, v, starts, longest, scale, window, causal).unsqueeze(0)


def _call_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
    causal: bool = True,
) -> Tensor:
    """[T,H,d], [T,K,d], [T,K,d] -> [T,H,d], by whatever this torch's `varlen_attn` takes."""
    accepts = _varlen_arguments()
    more: dict[str, Any] = {"scale": scale} if scale is not None else {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepts:
            more["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "window_size" in accepts:
        more["window_size"] = (-1 if window is None else window - 1, 0 if causal else -1)
    else:
        assert window is None
        more["is_causal"] = causal
    assert varlen_attn is not None
    out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **more)
    return out


@functools.cache
def _varlen_arguments() -> frozenset[str]:
    return frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()


@functools.cache
def _has_varlen(device: torch.device, dtype: torch.dtype, width: int, group: int) -> bool:
    """Whether this device runs `varlen_attn` forward and backward with such heads: tried once, on 8 tokens."""
    if varlen_attn is None or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if "window_size" not in _varlen_arguments():
        return False
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            q, k, v = (torch.ones(8, h, width, device=device, dtype=dtype, requires_grad=True) for h in (group, 1, 1))
            starts = torch.tensor([0, 5, 8], device=device, dtype=torch.int32)
            _call_varlen(q, k, v, starts, 5, width**-0.5, None).float().sum().backward()
            torch.cuda.synchronize(device)
            return q.grad is not None and bool(torch.isfinite(q.grad).all())
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # no kernel for this card or head width
        return False


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
