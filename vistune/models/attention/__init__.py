"""Attention over a pack: several samples in one row, none of which sees another.

Registered with `transformers` as "vistune_packed". A forward that is given `segments` attends inside each of them, one
that is given `places` in rows that go on (`rows`); any other behaves as the stock "sdpa" (masks included), so the same
model packs in training, generates and serves. Knows nothing of models or of what the segments hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vistune.models.attention import packed, rows, sdpa
from vistune.models.attention.choice import KERNELS, Choice, chosen, prefer
from vistune.models.attention.packs import Heads, Pack, Segments
from vistune.models.attention.rows import Places

__all__ = [
    "KERNELS",
    "NAME",
    "Choice",
    "Heads",
    "Places",
    "Segments",
    "attend",
    "chosen",
    "no_mask",
    "prefer",
    "segments",
    "settle",
    "settled",
    "use",
]

NAME = "vistune_packed"


def segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """Describe a pack by its samples' lengths, in order; zeros are left out. The host does not wait for the device."""
    host = torch.tensor([0, *itertools.accumulate(length for length in lengths if length)], dtype=torch.int32)
    torch._dynamo.maybe_mark_dynamic(host, 0)  # compiled layers take packs of any number of samples
    if device.type == "cpu":
        return Segments(host, host)
    pinned = host.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else host
    starts = pinned.to(device, non_blocking=True)
    torch._dynamo.maybe_mark_dynamic(starts, 0)
    return Segments(starts, host)


def use(model: PreTrainedModel) -> None:
    """Make `model` and its sub-models attend with this module. Costs nothing when they already do."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


def settle(kernel: str, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Ask for `kernel` from here on, and try it with the heads of the model that `config` describes.

    Returns its name for each part that attends in packs. ValueError when it was asked for by name and does not run.
    """
    prefer(kernel)
    return settled(config, device, dtype)


def settled(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The kernel's name for each part of the model that attends in packs, as it is asked for now."""
    dtype = torch.float32 if device.type == "cpu" else dtype
    return {part: chosen(heads).name for part, heads in heads_of(config, device, dtype).items()}


def heads_of(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Heads]:
    """The heads of the parts of a model that attend in packs: the language model, and towers that take patches of
    pictures of any size."""
    found = {}
    text, vision = config.text_config, config.vision_config
    if text.model_type != "mpt":  # whose attention is its own
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        group = heads // (getattr(text, "num_key_value_heads", None) or heads)
        windowed = bool(getattr(text, "sliding_window", None))
        found["language"] = Heads(device, dtype, width, group, True, windowed)
    if hasattr(vision, "spatial_merge_size"):
        found["vision"] = Heads(device, dtype, vision.embed_dim // vision.num_heads, causal=False)
    return found


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
    places: Places | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function `transformers` calls: query [B,H,T,d], key and value [B,K,T,d] -> [B,T,H,d]. Packs have B = 1.

    `module.is_causal` False: every position of a segment sees the whole segment, as in a vision tower.
    """
    if places is not None:
        compute, result = _types(query, value)
        q, k, v = query.to(compute), key.to(compute), value.to(compute)
        return rows.attend(q, k, v, places, scaling, sliding_window).to(result), None
    if segments is None:
        return _stock(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    assert query.shape[0] == 1, "a pack is one row"
    causal = bool(getattr(module, "is_causal", True))
    assert causal or sliding_window is None, "a sliding window looks back only"
    compute, result = _types(query, value)
    q, k, v = (each[0].transpose(0, 1).to(compute) for each in (query, key, value))
    how = (query.shape[-1] ** -0.5 if scaling is None else scaling, causal, sliding_window or 0)
    out = _with_dropout(q, k, v, segments, how, dropout) if dropout else packed.attend(q, k, v, *segments, how)
    return out.to(result).unsqueeze(0), None


def _types(query: Tensor, value: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The type to attend in and the result's: autocast's where that is on, as of products, since rotary angles may
    leave queries in fp32. A CPU attends in fp32: its bf16 kernel took 2 to 4 times as long (torch 2.13, AVX512)."""
    device = query.device.type
    result = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    half = result in (torch.bfloat16, torch.float16)
    return torch.float32 if device == "cpu" and half else result, result


@torch.compiler.disable
def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, how: tuple[float, bool, int], dropout: float
) -> Tensor:
    scale, causal, window = how
    return sdpa.attend(q, k, v, Pack(segments.starts, segments.lengths, scale, causal, window or None), dropout)


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
    compute, result = _types(query, value)
    if compute == result:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scale, **kwargs)[0]
    with torch.autocast("cpu", enabled=False):
        q, k, v = query.to(compute), key.to(compute), value.to(compute)
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scale, **kwargs)[0].to(result)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
