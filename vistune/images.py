"""Pictures: decode, resize, pad; how many tokens an image of a given size becomes.

Knows nothing of samples' text, tokenizers or models' weights.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image
import torch

from vistune import files
from vistune.samples import Image

MAX_PIXELS = 500_000_000
"""Larger images are refused: 1.5 GB of memory each, and far more often an attack or a mistake than a picture."""

# Pillow's own limit is lower and only warns; ours is checked before anything is decoded.
PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_REACH: dict[int, float] = {
    PIL.Image.Resampling.BILINEAR: 1.0,
    PIL.Image.Resampling.BICUBIC: 2.0,
    PIL.Image.Resampling.LANCZOS: 3.0,
}
"""How far a pixel of the result reaches to either side, in its own width or the source's pixels, whichever is more."""

_OPENINGS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"RIFF": "WEBP"}
"""First bytes -> Pillow's name. What begins so is read as that alone: some of Pillow's many other formats are known by
bytes further on, so one file could be two pictures, and looking for WebP among them all takes long."""

_BAND = 1 << 22
"""Pixels of a tall image's canvas that are filled at a time."""

RGB = tuple[float, float, float]
Mode = Literal["square", "pad"]

CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


class ImageError(ValueError):
    """An image that cannot be used: `code` says whether it is not there or not readable, `path` which one."""

    def __init__(self, code: Literal["image_missing", "image_broken"], path: str, reason: str):
        self.code: Literal["image_missing", "image_broken"] = code
        self.path = path
        self.reason = reason
        super().__init__(f"{path or 'image in the row'}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses from a worker to its parent
        return type(self), (self.code, self.path, self.reason)


class Picture:
    """One image, its file opened once: `size` and `format` (Pillow's name) from the header; then `rgb()` decodes."""

    def __init__(self, image: Image):
        """Reads the header. Raises ImageError."""
        self._image = image
        self._files = ExitStack()
        with _named(image.path), ExitStack() as opening:
            stream = opening.enter_context(_source(image))
            self._opened = opening.enter_context(PIL.Image.open(stream, formats=_formats(stream)))
            width, height = self.size = self._opened.size
            self.format = self._opened.format or ""
            if width * height > MAX_PIXELS:
                raise ImageError(
                    "image_broken", image.path, f"{width} x {height} pixels are more than {MAX_PIXELS:,}; shrink it"
                )
            self._files = opening.pop_all()

    def rgb(self) -> PIL.Image.Image:
        """The image in RGB; see `open_image`. Raises ImageError."""
        with _named(self._image.path):
            mode = self._opened.mode
            if mode.startswith("I;16"):
                return PIL.Image.fromarray((np.asarray(self._opened) >> 8).astype(np.uint8)).convert("RGB")
            if mode in ("I", "F"):
                reason = f"pixels of mode {mode} have no fixed range; save 8 bits"
                raise ImageError("image_broken", self._image.path, reason)
            self._opened.load()
            return self._opened if self._opened.mode == "RGB" else self._opened.convert("RGB")

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Picture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_image(image: Image) -> PIL.Image.Image:
    """The image in RGB. Alpha is dropped, not composited, and EXIF orientation is ignored, as the reference does.

    Gray of 16 bits is scaled to 8 (the reference lets it saturate). Raises ImageError.
    """
    with Picture(image) as picture:
        return picture.rgb()


def image_size(image: Image) -> tuple[int, int]:
    """Width and height in pixels, from the header alone. Raises ImageError."""
    with Picture(image) as picture:
        return picture.size


def image_header(image: Image) -> tuple[str, int, int]:
    """What Pillow calls the format, width and height. Raises ImageError."""
    with Picture(image) as picture:
        return picture.format, *picture.size


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Pillow and its many plugins raise nearly anything on broken bytes: all of it becomes ImageError here."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("image_missing", path, "no such file") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError("image_broken", path, f"more than {MAX_PIXELS:,} pixels; shrink it ({error})") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError("image_broken", path, "not an image that Pillow knows") from error
    except Exception as error:
        raise ImageError("image_broken", path, f"{type(error).__name__}: {error}") from error


def _formats(stream: Any) -> list[str] | None:
    """The one format that the stream's first bytes say; None: any that Pillow knows."""
    start = stream.read(8)
    stream.seek(0)
    return next(([name] for opening, name in _OPENINGS.items() if start.startswith(opening)), None)


def _source(image: Image) -> Any:
    if image.data is not None:
        return io.BytesIO(image.data)
    if not image.path:
        raise ImageError("image_missing", image.path, "the row names no image")
    if not files.is_remote(image.path) and os.path.exists(image.path) and not os.path.isfile(image.path):
        raise ImageError("image_broken", image.path, "a folder, a pipe or a device, no file")  # a pipe may never end
    return files.open_binary(image.path, image.start, image.size)


class Layout(Protocol):
    """How a family lays out an image: size in pixels -> number of tokens, picture -> pixels.

    Pixels are uint8: [3, H, W], the same for every image, where `grid` is None; else [patches, 3 * patch * patch], and
    `grid` says (frames, rows, columns) of them, or [tiles, 3, H, W], and it says (tiles, height, width): how many, and
    of what size in pixels the image was. Those of several images are laid end to end. An image that cannot be laid out
    raises ImageError. `repr` tells everything: the index is made anew when it changes.
    """

    @property
    def mean(self) -> RGB: ...

    @property
    def std(self) -> RGB: ...

    @property
    def needs_size(self) -> bool: ...  # False when only `prepare` looks at the picture: then no header is read

    def tokens(self, width: int, height: int) -> int: ...

    def grid(self, width: int, height: int) -> tuple[int, int, int] | None: ...

    def prepare(self, image: PIL.Image.Image) -> np.ndarray: ...

    def blank(self, width: int, height: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class FixedLayout:
    """Every image becomes `size` x `size` pixels, as in LLaVA-1.5.

    "square": the short side is resized to `resize` and the middle is cropped; with `resize=None` the image is stretched
    instead. "pad": first centred on a square canvas of the mean colour (reference: expand2square), so nothing is lost.
    """

    mode: Mode = "square"
    size: int = 336
    patch: int = 14
    extra_tokens: int = 0  # beside the patches, such as a class token that is kept
    resize: int | None = 336
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    resample: int = PIL.Image.Resampling.BICUBIC
    needs_size = False

    def __post_init__(self) -> None:
        if self.mode not in ("square", "pad"):
            raise ValueError(f"image: {self.mode!r} is unknown; choose square or pad")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"image processor: a short side of {self.resize} is less than the crop of {self.size}")

    def tokens(self, width: int = 0, height: int = 0) -> int:
        """The same for every image: one per patch, and the extra ones."""
        return (self.size // self.patch) ** 2 + self.extra_tokens

    def grid(self, width: int = 0, height: int = 0) -> None:
        """None: every image has the same pixels."""

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        """uint8 [3, size, size] of an RGB image. Raises ImageError when it is too long and thin to be resized."""
        padded = self.mode == "pad" and image.width != image.height
        pixels = self._padded(image) if padded else np.asarray(self._resized(image)).transpose(2, 0, 1)
        top, left = ((side - self.size) // 2 for side in pixels.shape[1:])
        return np.ascontiguousarray(pixels[:, top : top + self.size, left : left + self.size])

    def blank(self, width: int = 0, height: int = 0) -> np.ndarray:
        """Stands in for an image that could not be read: the mean colour, uint8 [3, size, size]."""
        return self._filled(self.size)

    def _narrowed(self, image: PIL.Image.Image, columns: range) -> PIL.Image.Image:
        """A tall image's rows on their canvas, resized to these columns of the result: a band of rows at a time, since
        the whole square of a strip of a thousand bytes would fill the memory."""
        side, scale = image.height, image.height / (self.resize or self.size)
        found, step = PIL.Image.new("RGB", (len(columns), side)), max(1, _BAND // side)
        for top in range(0, side, step):
            rows = min(step, side - top)
            band = PIL.Image.new("RGB", (side, rows), self._mean_colour())
            band.paste(image.crop((0, top, image.width, top + rows)), ((side - image.width) // 2, 0))
            box = (columns.start * scale, 0, columns.stop * scale, rows)
            found.paste(band.resize((len(columns), rows), self.resample, box=box), (0, top))
        return found

    def _filled(self, side: int) -> np.ndarray:
        """uint8 [3, side, side] of the mean colour."""
        pixels = np.empty((3, side, side), np.uint8)
        pixels[:] = np.array(self._mean_colour(), np.uint8)[:, None, None]
        return pixels

    def _padded(self, image: PIL.Image.Image) -> np.ndarray:
        """uint8 [3, H, W] of the image on a square canvas of the mean colour, resized.

        What is that colour all around is not computed, and Pillow resizes the rows first, each by itself, so rows of
        one colour are put on after that. Both change nothing else.
        """
        width, height = image.size
        side, wide = max(width, height), self.resize or self.size
        _check_room(side, side, image)
        reach = _REACH.get(self.resample, float(side))
        columns, rows = _touched(side, width, wide, reach), _touched(side, height, wide, reach)
        first = self.resample in _REACH
        if first and width < height:
            image = self._narrowed(image, columns)
        elif first:
            image = image.resize((wide, height), self.resample)
        canvas = PIL.Image.new("RGB", (image.width if first else side, side), self._mean_colour())
        canvas.paste(image, ((canvas.width - image.width) // 2, (side - height) // 2))
        scale = side / wide
        left, right = (0, image.width) if first else (columns.start * scale, columns.stop * scale)
        box = (left, rows.start * scale, right, rows.stop * scale)
        shown = canvas.resize((len(columns), len(rows)), self.resample, box=box)
        pixels = self._filled(wide)
        pixels[:, rows.start : rows.stop, columns.start : columns.stop] = np.asarray(shown).transpose(2, 0, 1)
        return pixels

    def _resized(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The short side is `resize`, or both are `size`."""
        if self.resize is None:
            return image.resize((self.size, self.size), self.resample)
        width, height = image.size
        long = int(self.resize * max(width, height) / min(width, height))
        _check_room(self.resize, long, image)
        return image.resize((self.resize, long) if width <= height else (long, self.resize), self.resample)

    def _mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue

    @classmethod
    def from_processor(
        cls, image_processor: Any, *, patch: int, extra_tokens: int = 0, mode: Mode | None = None
    ) -> FixedLayout:
        """The layout a `transformers` image processor (CLIP, LLaVA, SigLIP) describes; `mode` None: as it says.

        Raises ValueError for a processor that does not give every image one square size.
        """
        read = settings(image_processor)
        size, resize = _sides(read, mode)
        normalized = read.get("do_normalize", True)
        return cls(
            mode=mode or ("pad" if read.get("do_pad") else "square"),
            size=size,
            patch=patch,
            extra_tokens=extra_tokens,
            resize=resize,
            mean=three(read["image_mean"]) if normalized else (0.0, 0.0, 0.0),
            std=three(read["image_std"]) if normalized else (1.0, 1.0, 1.0),
            resample=int(read["resample"]),
        )


def normalize(pixels: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """(x / 255 - mean) / std of uint8 [N, 3, H, W], [3, H, W] or [patches, 3 * values], in the same shape.

    Computed in fp32 on the pixels' device and cast to `dtype`.
    """
    if pixels.ndim == 3:
        return normalize(pixels[None], layout, dtype)[0]
    # One product and one sum, of numbers made in double precision: within 3e-7 of three roundings in a row.
    scale = torch.tensor([1 / (255 * std) for std in layout.std], device=pixels.device).view(3, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(layout.mean, layout.std, strict=True)], device=pixels.device)
    flat = pixels.float().view(len(pixels), 3, -1)
    return flat.mul_(scale).add_(shift.view(3, 1)).to(dtype).view(pixels.shape)


def _touched(side: int, length: int, wide: int, reach: float) -> range:
    """Of `side` pixels made `wide`: those that the `length` ones in the middle have a part in, and some more.

    It begins and ends where a pixel of the result begins with one of the source, so that resizing the part gives
    exactly what resizing the whole gives there.
    """
    scale, step = side / wide, wide // math.gcd(side, wide)
    start, far = (side - length) // 2, reach * max(1.0, side / wide) + 1
    first = math.floor((start - far) / scale - 1) // step * step
    last = -(-math.ceil((start + length + far) / scale + 1) // step) * step
    return range(max(0, first), min(wide, last))


def _check_room(width: int, height: int, image: PIL.Image.Image) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            "image_broken",
            getattr(image, "filename", ""),
            f"{image.width} x {image.height} is too long and thin: resizing it takes {width} x {height} pixels",
        )


def settings(image_processor: Any) -> dict[str, Any]:
    """An image processor of `transformers` as the table its JSON is. ValueError unless it resizes and rescales."""
    read = image_processor if isinstance(image_processor, dict) else image_processor.to_dict()
    name = read.get("image_processor_type", type(image_processor).__name__)
    if not read.get("do_resize", True):
        raise ValueError(f"image processor {name}: do_resize is false; images of one size are needed")
    if abs(read.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6 or not read.get("do_rescale", True):
        raise ValueError(f"image processor {name}: pixels must be rescaled by 1/255")
    return read


def _sides(read: dict[str, Any], mode: Mode | None) -> tuple[int, int | None]:
    """Final side, and the short side before the crop (None: stretched, no crop)."""
    size = read["size"] if isinstance(read["size"], dict) else {"shortest_edge": read["size"]}
    crop = read.get("crop_size") if read.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if (short := size.get("shortest_edge")) is not None:
        if crop is None and not (mode == "pad" or read.get("do_pad")):
            raise ValueError('image processor: without a crop, images keep their shape; say image = "pad"')
        height, width, resize = (crop["height"], crop["width"], short) if crop else (short, short, short)
    elif "height" in size and "width" in size and crop in (None, size):
        height, width, resize = size["height"], size["width"], None
    else:
        raise ValueError(f"image processor: size {size} with crop {crop} is not understood")
    if height != width:
        raise ValueError(f"image processor: {height} x {width} is not square")
    return int(height), None if resize is None else int(resize)


def three(values: Any) -> RGB:
    """Three floats, one a channel."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue
