"""The RICE tower while it trains: pictures of any size in one row, without gradient where nothing of it learns, and the
operations that takes. Shapes: P patches of all pictures, C the tower's width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vistune.models import attention
from vistune.models.flops import Piece, learns
from vistune.models.language import layer_pieces
from vistune.models.shipped.modeling_llavaonevision1_5 import by_row


def see(tower: Any, pixels: Tensor, grids: Tensor, tokens: Sequence[int] = ()) -> Tensor:
    """What the merger is given, of patches [P, 588] and grids [N, 3] (on the host): [P, C].

    The tower's attention must be `attention.NAME`: every picture, and every frame of a video, sees itself only.
    `tokens` of each sample's pictures: only `legacy_images`, whose fault is within a sample, asks for it.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and learning(tower)):
        if not (tower.config.legacy_images and len(tokens)):
            return _encoded(tower, pixels, grids)
        rows = by_row(pixels, grids, tokens, tower.config.spatial_merge_size**2)
        return torch.cat([_encoded(tower, *row) for row in rows if len(row[1])])


def _encoded(tower: Any, pixels: Tensor, grids: Tensor) -> Tensor:
    segments = attention.segments([1 + patches for patches in frames(grids)], pixels.device)
    return tower.encode(pixels, grids, segments=segments)


def learning(tower: Any) -> bool:
    """Whether something of the tower learns, its merger apart."""
    return any(p.requires_grad for name, p in tower.named_parameters() if not name.startswith("merger."))


def frames(grids: Tensor) -> list[int]:
    """Patches of each frame; a picture is one."""
    return [rows * columns for count, rows, columns in grids.tolist() for _ in range(count)]


def pieces(vision: Any, grids: Tensor, learn: Collection[str]) -> list[Piece]:
    """The tower's and the merger's part of a forward pass; `vision` is its config."""
    sizes: Sequence[int] = frames(grids)
    patches, width = sum(sizes), vision.embed_dim
    rows = patches + len(sizes)
    rest, layers = learns(learn, "vision", vision.depth)
    scores = 4 * sum((size + 1) ** 2 for size in sizes) * width
    found = [Piece(2 * patches * width * vision.in_channels * vision.patch_size**2, learns=rest), Piece(learns=rest)]
    for learning in layers:
        others = width**2 + 2 * width * vision.intermediate_size
        found += layer_pieces(2 * rows * 3 * width**2, scores, 2 * rows * others, learning)
    tokens, joined = patches // vision.spatial_merge_size**2, width * vision.spatial_merge_size**2
    merges = "connector" in learn
    found += [Piece(learns=merges), Piece(2 * tokens * joined**2, learns=merges)]
    return [*found, Piece(2 * tokens * joined * vision.text_hidden_size, learns=merges)]
