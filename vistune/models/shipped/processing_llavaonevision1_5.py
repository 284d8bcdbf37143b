"""LLaVA-OneVision-1.5's pictures and prompts as the model takes them, on Pillow alone. Needs torch, numpy and
transformers, and goes with the model's file into the folders that vistune writes; the ids are those that training saw.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

LONGEST, CUT = 200, 180
FIRST_MIN, FIRST_MAX = 4 * 28 * 28, 16384 * 28 * 28
FRAME_PIXELS, VIDEO_PIXELS = 768 * 28 * 28, 65536 * 28 * 28
"""Most pixels of a frame, and of all frames together, as the published data code has them."""
WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")


class LLaVAOneVision1_5_ImageProcessor(ImageProcessingMixin):
    """Pictures at their own size -> patches [P, 588] of fp32 and grids. `min_pixels` and `max_pixels` win over `size`.

    `image_resolution`: first resized as conversations of several turns were in training, its longest side capped.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012

    def __init__(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: dict[str, int] | None = None,
        patch_size: int = 14,
        merge_size: int = 2,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resample: int = 3,
        image_resolution: int | None = None,
        **_: Any,
    ):
        super().__init__()
        edges = size or {}
        self.min_pixels = min_pixels or edges.get("min_pixels") or edges.get("shortest_edge") or 3136
        self.max_pixels = max_pixels or edges.get("max_pixels") or edges.get("longest_edge") or 2560000
        self.patch_size, self.merge_size = patch_size, merge_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.resample, self.image_resolution = int(resample), image_resolution

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **_: Any) -> Any:
        return cls(**image_processor_dict)

    def to_dict(self) -> dict[str, Any]:
        """preprocessor_config.json as it is published, so that the stock Qwen2-VL classes read it too."""
        return {
            "auto_map": {"AutoProcessor": "processing_llavaonevision1_5.LLaVAOneVision1_5_Processor"},
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": self.image_mean,
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": self.image_std,
            "max_pixels": self.max_pixels,
            "merge_size": self.merge_size,
            "min_pixels": self.min_pixels,
            "patch_size": self.patch_size,
            "processor_class": "Qwen2_5_VLProcessor",
            "resample": self.resample,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": self.max_pixels, "shortest_edge": self.min_pixels},
            "temporal_patch_size": 1,
        } | ({} if self.image_resolution is None else {"image_resolution": self.image_resolution})

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        """Pictures (PIL, arrays [H, W, 3], paths; in lists of any depth), end to end."""
        made = [self._patches([_rgb(image)], self._steps(*_rgb(image).size)) for image in _flat(images)]
        return _joined(made, "pixel_values", "image_grid_thw")

    def videos(self, videos: Any) -> BatchFeature:
        """Videos, each a list of frames of one size or an array [frames, H, W, 3]; every frame as a picture."""
        made = []
        for video in _each_video(videos):
            frames = [_rgb(frame) for frame in video]
            most = min(self.max_pixels, FRAME_PIXELS, VIDEO_PIXELS // len(frames))
            high, wide = _smart(*frames[0].size[::-1], self._factor, self.min_pixels, max(most, self.min_pixels))
            made.append(self._patches(frames, [(wide, high, self.resample)]))
        return _joined(made, "pixel_values_videos", "video_grid_thw")

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def _steps(self, width: int, height: int) -> list[tuple[int, int, int]]:
        """(width, height, resample) of each resizing, in order."""
        first = [] if self.image_resolution is None else self._capped(width, height, self.image_resolution)
        wide, high = first[-1][:2] if first else (width, height)
        high, wide = _smart(high, wide, self._factor, self.min_pixels, self.max_pixels)
        return [*first, (wide, high, self.resample)]

    def _capped(self, width: int, height: int, cap: int) -> list[tuple[int, int, int]]:
        high, wide = _smart(height, width, self._factor, FIRST_MIN, FIRST_MAX, self._factor)
        steps = [(wide, high, int(Image.Resampling.BICUBIC))]
        if (longest := max(wide, high)) > cap:
            wide, high = int(wide * (cap / longest)), int(high * (cap / longest))
            steps.append((wide, high, int(Image.Resampling.NEAREST)))
        if min(wide, high) < self._factor:
            wide, high = max(wide, self._factor), max(high, self._factor)
            steps.append((wide, high, int(Image.Resampling.NEAREST)))
        if max(wide, high) > LONGEST * min(wide, high):
            wide, high = (high * CUT, high) if wide > high else (wide, wide * CUT)
            steps.append((wide, high, int(Image.Resampling.NEAREST)))
        return steps

    def _patches(
        self, frames: Sequence[Image.Image], steps: Sequence[tuple[int, int, int]]
    ) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Token after token, in each its patches row by row, in each channel after channel."""
        for wide, high, resample in steps:
            frames = [f if f.size == (wide, high) else f.resize((wide, high), resample) for f in frames]
        pixels: np.ndarray = np.stack([np.asarray(frame, np.float32) for frame in frames])
        pixels = (pixels / 255 - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        count, high, wide, _ = pixels.shape
        merge, patch, factor = self.merge_size, self.patch_size, self._factor
        cut = pixels.reshape(count, high // factor, merge, patch, wide // factor, merge, patch, 3)
        rows = cut.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * patch * patch)
        return rows, (count, high // patch, wide // patch)


def _smart(height: int, width: int, factor: int, least: int, most: int, at_least: int = 0) -> tuple[int, int]:
    """Height and width as multiples of `factor`, their product within limits, the shape nearly kept."""
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than {LONGEST} times the other")
    high, wide = (max(at_least, round(side / factor) * factor) for side in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


def _rgb(image: Any) -> Image.Image:
    """In RGB: alpha is dropped, not laid on white; gray of 16 bits is scaled to 8."""
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if isinstance(image, np.ndarray):
        channels_first = image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[-1] not in (1, 3, 4)
        image = Image.fromarray(image.transpose(1, 2, 0) if channels_first else image)
    elif not isinstance(image, Image.Image):
        image = Image.open(image) if os.path.exists(image) else load_image(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _each_video(videos: Any) -> Iterator[Any]:
    """Of a list of any depth: an array of four dimensions is a video, and so is a list of pictures."""
    pictures = isinstance(videos, list | tuple) and not isinstance(videos[0], list | tuple)
    if getattr(videos, "ndim", 0) == 4 or (pictures and getattr(videos[0], "ndim", 0) != 4):
        yield videos
    else:
        for video in videos:
            yield from _each_video(video)


def _joined(made: Iterable[tuple[np.ndarray, tuple[int, int, int]]], pixels: str, grids: str) -> BatchFeature:
    patches, shapes = zip(*made, strict=True)
    joined = {pixels: torch.from_numpy(np.concatenate(patches)), grids: torch.tensor(shapes, dtype=torch.int64)}
    return BatchFeature(joined)


class LLaVAOneVision1_5_Processor(ProcessorMixin):
    """Text with `<|image_pad|>` once for every picture, `<|video_pad|>` for every video -> ids with as many as each
    becomes, beside the pixels."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A folder or a hub repository; `min_pixels`, `max_pixels` and `image_resolution` override what it says."""
        where = {key: kwargs[key] for key in WHERE if kwargs.get(key) is not None}
        images: Any = LLaVAOneVision1_5_ImageProcessor.from_pretrained(folder, **where)
        for key in ("min_pixels", "max_pixels", "image_resolution"):
            if kwargs.get(key) is not None:
                setattr(images, key, kwargs[key])
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **where)
        return cls(images, tokenizer, chat_template=tokenizer.chat_template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """`input_ids` and `attention_mask`; with pictures `pixel_values`, `image_grid_thw`; with videos theirs."""
        texts = [text] if isinstance(text, str) else list(text or [])
        found: dict[str, Any] = {}
        if images is not None and len(list(_flat(images))):
            found |= self.image_processor(images)
            texts = self._expanded(texts, self.image_token, found["image_grid_thw"])
        if videos is not None and len(videos):
            found |= self.image_processor.videos(videos)
            texts = self._expanded(texts, self.video_token, found["video_grid_thw"])
        known = {**kwargs.pop("text_kwargs", {}), **kwargs}
        known = {key: value for key, value in known.items() if key in _TEXT}
        return BatchFeature({**(self.tokenizer(texts, **known) if texts else {}), **found})

    def _expanded(self, texts: Sequence[str], token: str, grids: torch.Tensor) -> list[str]:
        counts = (grids.prod(1) // self.image_processor.merge_size**2).tolist()
        asked = sum(text.count(token) for text in texts)
        if asked != len(counts):
            raise ValueError(f"{len(counts)} pictures or videos for {asked} {token} in the text; give one for each")
        one = iter(counts)
        return ["".join(_spread(text.split(token), token, one)) for text in texts]


_TEXT = (
    *("add_special_tokens", "padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length"),
    *("return_tensors", "return_attention_mask", "return_offsets_mapping", "return_special_tokens_mask"),
)
"""What is handed on to the tokenizer; the rest is meant for other processors."""


def _spread(pieces: Sequence[str], token: str, counts: Iterator[int]) -> Iterator[str]:
    yield pieces[0]
    for piece in pieces[1:]:
        yield token * next(counts)
        yield piece
