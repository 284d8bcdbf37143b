"""Pictures cut into tiles, as LLaVA-NeXT (1.6) takes them: the whole picture small, then piece by piece at nearly its
own size. Knows nothing of tokenizers or of models' weights.

Sizes are (height, width) in pixels inside this file, as `transformers` says them; the original says (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vistune.images import CLIP_MEAN, CLIP_STD, RGB, settings, three

Size = tuple[int, int]


def standard_pinpoints(size: int) -> tuple[Size, ...]:
    """The canvases of LLaVA-1.6 for tiles of `size` pixels, in its order: of two that suit equally the first is taken.

    The published llava-hf folders hold the original's list of (width, height) and read it as (height, width), so there
    such a tie goes to the canvas lying down, here and in the original to the upright one.
    """
    return tuple((high * size, wide * size) for high, wide in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)))


def best_pinpoint(height: int, width: int, pinpoints: Sequence[Size]) -> Size:
    """The canvas on which most of the picture's pixels survive; among equals the one with the least left empty."""

    def suits(canvas: Size) -> tuple[int, int]:
        high, wide = canvas
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - wide * high

    return max(pinpoints, key=suits)


def unpadded(rows: int, columns: int, height: int, width: int) -> tuple[range, range]:
    """The rows and columns of a canvas's features that a picture of height x width pixels covers.

    As the stock class counts them: the scaled side is rounded to 7 digits before it is cut off. The original cuts off
    at once, which differs where a product like 4.999999999999999 stands for 5: up to 2,000 x 2,000 pixels, 1 size in
    38,000.
    """
    if width / height > columns / rows:
        left_out = (rows - int(round(height * (columns / width), 7))) // 2
        return range(left_out, rows - left_out), range(columns)
    left_out = (columns - int(round(width * (rows / height), 7))) // 2
    return range(rows), range(left_out, columns - left_out)


@dataclass(frozen=True, kw_only=True)
class AnyresLayout:
    """Every image becomes tiles of `size` x `size` pixels: the whole image pressed into one, then the image scaled to
    fit the best of `pinpoints`, on black, cut row by row.

    Its tokens are the first tile's patches, then row by row the patches that the image covers, one more at each end.
    """

    size: int = 336
    patch: int = 14
    pinpoints: tuple[Size, ...] = standard_pinpoints(336)
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    resample: int = int(PIL.Image.Resampling.BICUBIC)
    mode = "anyres"
    needs_size = True

    def __post_init__(self) -> None:
        check_pinpoints(self.pinpoints, self.size)

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.size // self.patch

    def tokens(self, width: int, height: int) -> int:
        """Placeholders of an image of that size in pixels."""
        rows, columns = self.covered(width, height)
        return self.side**2 + len(rows) * (len(columns) + 1)

    def canvas(self, width: int, height: int) -> Size:
        """(height, width) of the canvas that suits an image of that size best."""
        return best_pinpoint(height, width, self.pinpoints)

    def covered(self, width: int, height: int) -> tuple[range, range]:
        """Rows and columns of its canvas's patches that an image of that size covers."""
        high, wide = self.canvas(width, height)
        return unpadded(high // self.size * self.side, wide // self.size * self.side, height, width)

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Tiles, and the image's height and width in pixels."""
        high, wide = self.canvas(width, height)
        return 1 + (high // self.size) * (wide // self.size), height, width

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        """uint8 [tiles, 3, size, size] of an RGB image."""
        pieces = self._cut(np.asarray(self._fitted(image, self.canvas(*image.size))))
        tiles = np.empty((1 + len(pieces), 3, self.size, self.size), np.uint8)
        tiles[0] = np.asarray(image.resize((self.size, self.size), self.resample)).transpose(2, 0, 1)
        tiles[1:] = pieces
        return tiles

    def blank(self, width: int, height: int) -> np.ndarray:
        """Stands in for an image of that size that could not be decoded: the mean colour, shaped as `prepare` does."""
        colour = np.array([int(channel * 255) for channel in self.mean], np.uint8)
        tiles, _, _ = self.grid(width, height)
        return np.ascontiguousarray(np.broadcast_to(colour[None, :, None, None], (tiles, 3, self.size, self.size)))

    def cuts(self, width: int, height: int) -> tuple[list[float], list[float]]:
        """Where one tile of an image of that size ends and the next begins: from its left and from its top, as shares
        of its width and height."""
        high, wide = self.canvas(width, height)
        scale = min(wide / width, high / height)
        across = [(at - (wide - width * scale) / 2) / (width * scale) for at in range(self.size, wide, self.size)]
        down = [(at - (high - height * scale) / 2) / (height * scale) for at in range(self.size, high, self.size)]
        return [share for share in across if 0 < share < 1], [share for share in down if 0 < share < 1]

    def _fitted(self, image: PIL.Image.Image, canvas: Size) -> PIL.Image.Image:
        """The image as large as it can be in the middle of the black canvas."""
        high, wide = canvas
        across, down = wide / image.width, high / image.height
        if across < down:
            fitted = wide, min(math.ceil(image.height * across), high)
        else:
            fitted = min(math.ceil(image.width * down), wide), high
        whole = PIL.Image.new("RGB", (wide, high))
        whole.paste(image.resize(fitted, self.resample), ((wide - fitted[0]) // 2, (high - fitted[1]) // 2))
        return whole

    def _cut(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, 3] -> [tiles, 3, size, size], row by row."""
        high, wide, channels = pixels.shape
        tiles = pixels.reshape(high // self.size, self.size, wide // self.size, self.size, channels)
        return tiles.transpose(0, 2, 4, 1, 3).reshape(-1, channels, self.size, self.size)

    @classmethod
    def from_processor(
        cls, image_processor: Any, *, patch: int, pinpoints: Sequence[Sequence[int]] | None = None
    ) -> AnyresLayout:
        """The layout of a LLaVA-NeXT image processor, or of a tower's (CLIP, SigLIP) with tiles of its size: an object
        of `transformers`, or its JSON as a dict. `pinpoints`, as (height, width), win over the processor's; without
        any they are LLaVA-1.6's. Raises ValueError for a processor whose tiles are not square and of one size.
        """
        read = settings(image_processor)
        size = _side(read)
        named = pinpoints or read.get("image_grid_pinpoints") or standard_pinpoints(size)
        normalized = read.get("do_normalize", True)
        return cls(
            size=size,
            patch=patch,
            pinpoints=tuple((int(high), int(wide)) for high, wide in named),
            mean=three(read["image_mean"]) if normalized else (0.0, 0.0, 0.0),
            std=three(read["image_std"]) if normalized else (1.0, 1.0, 1.0),
            resample=int(read["resample"]),
        )


def check_pinpoints(pinpoints: Sequence[Sequence[int]], size: int) -> None:
    """ValueError unless there are pinpoints, each (height, width) of whole tiles of `size` pixels."""
    if not pinpoints:
        raise ValueError("image_grid_pinpoints: there are none; give at least one (height, width)")
    for each in pinpoints:
        if len(each) != 2 or any(side <= 0 or side % size for side in each):
            raise ValueError(
                f"image_grid_pinpoints: {list(each)} is not (height, width) of whole tiles of {size} pixels"
            )


def _side(read: dict[str, Any]) -> int:
    """The tile's side, which the first view, the crop and the resize of a tile must share."""
    size = read["size"] if isinstance(read["size"], dict) else {"shortest_edge": read["size"]}
    crop = read.get("crop_size") if read.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
    sides = {int(side) for table in (size, crop) for side in table.values() if side is not None}
    if len(sides) != 1:
        raise ValueError(f"image processor: size {size} with crop {crop or 'none'} gives no square tiles of one size")
    return sides.pop()
