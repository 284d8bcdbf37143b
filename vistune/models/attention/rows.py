"""Attention of several rows at once, each at a place of its own: new positions to what is remembered of their row.

Knows nothing of how keys and values are kept. Shapes: n rows, c new positions of each, L remembered ones, H heads that
ask, K heads that are asked, d their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 32
"""Places that are looked at together: shapes change no more often than this, and masks lie as kernels want them."""
PIECE = 256
"""New positions of a row that attend together: a mask is as large as all of them times all that they may see."""


def moved(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """int64 numbers on a device; the host does not wait for it."""
    host = torch.tensor(numbers, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class Places:
    """Where new positions lie: row i has `counts[i]` of them, at most `width`, from `starts[i]` on; the rest of its
    `width` is padding. `room`: places that a row has."""

    def __init__(self, starts: Sequence[int], counts: Sequence[int], width: int, room: int, device: torch.device):
        self.width, self.device, self._room = width, device, room
        self._ends = [(start, start + count) for start, count in zip(starts, counts, strict=True)]
        self.longest = max(end for _, end in self._ends)
        level = len(set(starts)) == 1 and all(count == width for count in counts)
        self.first = level and starts[0] == 0
        """Nothing was before, and nothing is padding: a triangle is all that is seen."""
        self.last = level and width == 1
        """Everything that is looked at is seen."""
        self.seen = self.longest if self.first or self.last else self.seen_by(width)
        """L: how many places are looked at."""
        begin, count = moved([starts, counts], device).unsqueeze(2)
        across = torch.arange(width, device=device)
        self.positions = begin + (across if all(each == width for each in counts) else torch.minimum(across, count - 1))
        """[n, c]: padding stands where the last new position of its row does, so that it sees something."""
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}

    def seen_by(self, positions: int) -> int:
        """How many places are looked at by so many first ones of the new positions."""
        last = max(min(start + positions, end) for start, end in self._ends)
        return min(-(-last // STEP) * STEP, self._room)

    def mask(self, dtype: torch.dtype, window: int | None, group: int = 1) -> Tensor | None:
        """What is added to scores: [n, 1, group * c, L], zero where a position sees a place; None: nothing is hidden.
        `window` counts the position itself, as `transformers` does."""
        window = window if window and window < self.longest else None
        group = 1 if self.width == 1 else group
        if (key := (dtype, window, group)) not in self._masks:
            hides = not self.last or window is not None
            self._masks[key] = self.mask_of(self.positions, self.seen, dtype, window, group) if hides else None
        return self._masks[key]

    def mask_of(self, positions: Tensor, seen: int, dtype: torch.dtype, window: int | None, group: int) -> Tensor:
        """The same for some of the positions, of the first `seen` places."""
        place = torch.arange(seen, device=self.device)
        at = positions.unsqueeze(2)
        hidden = place > at
        if window is not None:
            hidden |= place <= at - window
        added = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return added.repeat(1, group, 1).unsqueeze(1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, places: Places, scale: float | None, window: int | None = None
) -> Tensor:
    """[n,H,c,d], [n,K,L,d], [n,K,L,d] -> [n,c,H,d]."""
    windowed = window is not None and window < places.longest
    if places.first and places.width > 1 and not windowed:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    group = query.shape[1] // key.shape[1]
    if places.width <= PIECE:
        return _grouped(query, key, value, places.mask(query.dtype, window, group), scale)
    outs = []
    for first in range(0, places.width, PIECE):
        seen = min(places.seen_by(first + PIECE), places.seen)
        mask = places.mask_of(places.positions[:, first : first + PIECE], seen, query.dtype, window, group)
        some = query[:, :, first : first + PIECE]
        outs.append(_grouped(some, key[:, :, :seen], value[:, :, :seen], mask, scale))
    return torch.cat(outs, 1)


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Heads that ask the same one become its positions: what is remembered is read once, and copied for none."""
    rows, heads, width, _ = query.shape
    query = query.reshape(rows, key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return out.reshape(rows, heads, width, -1).transpose(1, 2)
