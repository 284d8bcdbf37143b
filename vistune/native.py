"""Pictures at their own size, as Qwen2-VL and LLaVA-OneVision-1.5 take them: patches and a grid instead of a square.

Knows nothing of tokenizers or of models' weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vistune.images import CLIP_MEAN, CLIP_STD, RGB, ImageError, three

LONGEST = 200
"""How many times its short side a picture may be long; the published processors refuse more."""

CUT = 180
"""What the reference stretches a picture to that became longer than that by its own cap."""


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int, at_least: int = 0
) -> tuple[int, int]:
    """The height and width in pixels to which a picture is resized: multiples of `factor`, their product between
    `min_pixels` and `max_pixels`, the shape nearly kept.

    As `transformers` does it; with `at_least = factor` as qwen_vl_utils, which rounds a thin side up before it looks at
    the area. Raises ValueError for a picture more than 200 times as long as wide.
    """
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"{width} x {height} pixels: one side is more than {LONGEST} times the other; crop the picture or leave it "
            "out"
        )
    sides = height, width
    high, wide = (max(at_least, round(side / factor) * factor) for side in sides)
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in sides)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in sides)
    return high, wide


@dataclass(frozen=True, kw_only=True)
class NativeLayout:
    """Every image keeps its shape and becomes `patch` x `patch` squares, `merge` x `merge` of which are one token.

    With `image_resolution` the reference's way for conversations with several turns goes before: resized once with
    `first_min_pixels` and `first_max_pixels`, then the longest side is capped by leaving out pixels.
    """

    patch: int = 14
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 1600 * 1600
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    resample: int = int(PIL.Image.Resampling.BICUBIC)
    image_resolution: int | None = None
    first_min_pixels: int = 4 * 28 * 28
    first_max_pixels: int = 16384 * 28 * 28
    needs_size = True

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"image processor: min_pixels = {self.min_pixels}, max_pixels = {self.max_pixels}")
        if self.image_resolution is not None and self.image_resolution < self.factor:
            raise ValueError(f"image_resolution = {self.image_resolution}: at least {self.factor} pixels")

    @property
    def factor(self) -> int:
        """Both sides of what the model sees are multiples of it: the side of one token in pixels."""
        return self.patch * self.merge

    def tokens(self, width: int, height: int) -> int:
        """Placeholders of an image of that size in pixels. Raises ImageError for one that is too long and thin."""
        return math.prod(self.grid(width, height)) // self.merge**2

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Frames (one), rows and columns of patches. Raises ImageError as `tokens` does."""
        wide, high, _ = self._steps(width, height)[-1]
        return 1, high // self.patch, wide // self.patch

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        """uint8 [rows * columns, 3 * patch * patch] of an RGB image: token after token, in each its patches row by row,
        in each channel after channel. Raises ImageError as `tokens` does."""
        for wide, high, resample in self._steps(*image.size):
            if image.size != (wide, high):
                image = image.resize((wide, high), resample)
        return self._patches(np.asarray(image))

    def blank(self, width: int, height: int) -> np.ndarray:
        """Stands in for an image of that size that could not be decoded: the mean colour, shaped as `prepare` does."""
        colour = np.array([int(channel * 255) for channel in self.mean], np.uint8)
        patches = math.prod(self.grid(width, height))
        return np.tile(np.repeat(colour, self.patch**2), (patches, 1))

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        high, wide, channels = pixels.shape
        rows, columns = high // self.factor, wide // self.factor
        cut = pixels.reshape(rows, self.merge, self.patch, columns, self.merge, self.patch, channels)
        return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * self.patch**2)

    def _steps(self, width: int, height: int) -> list[tuple[int, int, int]]:
        """(width, height, resample) of each resizing of an image, in order."""
        try:
            first = [] if self.image_resolution is None else self._capped(width, height, self.image_resolution)
            wide, high = first[-1][:2] if first else (width, height)
            limits: dict[str, int] = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            high, wide = smart_resize(high, wide, factor=self.factor, **limits)
        except ValueError as error:
            raise ImageError("image_broken", "", str(error)) from None
        return [*first, (wide, high, self.resample)]

    def _capped(self, width: int, height: int, cap: int) -> list[tuple[int, int, int]]:
        nearest = PIL.Image.Resampling.NEAREST
        limits = {"min_pixels": self.first_min_pixels, "max_pixels": self.first_max_pixels}
        high, wide = smart_resize(height, width, factor=self.factor, at_least=self.factor, **limits)
        steps = [(wide, high, int(PIL.Image.Resampling.BICUBIC))]
        if (longest := max(wide, high)) > cap:
            # Cut off, not rounded, and with the quotient made first: 644 becomes 511 for a cap of 512.
            wide, high = int(wide * (cap / longest)), int(high * (cap / longest))
            steps.append((wide, high, nearest))
        if min(wide, high) < self.factor:
            wide, high = max(wide, self.factor), max(high, self.factor)
            steps.append((wide, high, nearest))
        if max(wide, high) > LONGEST * min(wide, high):
            wide, high = (high * CUT, high) if wide > high else (wide, wide * CUT)
            steps.append((wide, high, nearest))
        return steps

    @classmethod
    def from_processor(cls, image_processor: Any, *, image_resolution: int | None = None) -> NativeLayout:
        """The layout a Qwen2-VL image processor describes: an object of `transformers`, or its JSON as a dict.

        `min_pixels` and `max_pixels` win over the edges of `size`, which older files carry beside them unused. Raises
        ValueError for one that is not understood.
        """
        read = image_processor if isinstance(image_processor, dict) else image_processor.to_dict()
        name = read.get("image_processor_type", type(image_processor).__name__)
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not read.get(key, True):
                raise ValueError(f"image processor {name}: {key} is false, which is not supported")
        if abs(read.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"image processor {name}: pixels must be rescaled by 1/255")
        if (frames := read.get("temporal_patch_size", 2)) != 1:
            raise ValueError(
                f"image processor {name}: temporal_patch_size is {frames}; patches of one frame are needed"
            )
        return cls(
            patch=int(read.get("patch_size", 14)),
            merge=int(read.get("merge_size", 2)),
            min_pixels=_limit(read, "min_pixels", "shortest_edge", name),
            max_pixels=_limit(read, "max_pixels", "longest_edge", name),
            mean=three(read.get("image_mean", CLIP_MEAN)),
            std=three(read.get("image_std", CLIP_STD)),
            resample=int(read.get("resample", PIL.Image.Resampling.BICUBIC)),
            image_resolution=image_resolution,
        )


def open_native(folder: Path | str, *, image_resolution: int | None = None) -> NativeLayout | None:
    """The layout that the processor files of a model's folder describe; None when there are none, or of another kind.

    Raises ValueError as `NativeLayout.from_processor` does, and for a file that is no JSON.
    """
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if not (path := Path(folder) / name).is_file():
            continue
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        described = (read.get(key) or {}) if key else read
        if "Qwen2VL" in described.get("image_processor_type", ""):
            return NativeLayout.from_processor(described, image_resolution=image_resolution)
    return None


def _limit(read: dict[str, Any], key: str, edge: str, name: str) -> int:
    size = dict(read.get("size") or {})
    for value in (read.get(key), size.get(key), size.get(edge)):
        if value is not None:
            return int(value)
    raise ValueError(f"image processor {name}: neither {key} nor size.{edge} is there")
