"""Pictures at their own size, against the reference's vectors and the stock processor."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vistune.images import CLIP_MEAN, ImageError, image_size, normalize, open_image
from vistune.native import NativeLayout, open_native, smart_resize
from vistune.samples import Image

GOLDEN = Path(__file__).parent / "golden" / "onevision15"
SAID = json.loads((GOLDEN / "preprocess.json").read_text())


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "preprocess.npz") as read:
        return dict(read)


def picture(name: str) -> Image:
    return Image(path=str(GOLDEN / SAID["patches" if name[0] == "p" else "multimixqa"][name]["file"]))


def noise(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def normalized(layout: NativeLayout, patches: np.ndarray) -> np.ndarray:
    return normalize(torch.from_numpy(patches), layout, torch.float32).numpy()


def test_smart_resize_is_the_references() -> None:
    table = vectors()["smart_resize/table"]
    assert len(table) == 30
    for height, width, low, high, *wanted in table.tolist():
        limits = {"min_pixels": low, "max_pixels": high}
        assert list(smart_resize(height, width, **limits)) == wanted[:2]
        if min(wanted[2:]):  # qwen_vl_utils gives a side of 0 once
            assert list(smart_resize(height, width, at_least=28, **limits)) == wanted[2:]


@pytest.mark.parametrize("case", SAID["smart_resize_errors"], ids=lambda case: f"{case['w']}x{case['h']}")
def test_too_long_and_thin_is_a_broken_image(case: dict) -> None:
    size, limits = (case["w"], case["h"]), {"min_pixels": case["min"], "max_pixels": case["max"]}
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels.*200 times"):
        smart_resize(case["h"], case["w"], **limits)
    layout = NativeLayout(**limits)
    for ask in (lambda: layout.tokens(*size), lambda: layout.prepare(PIL.Image.new("RGB", size))):
        with pytest.raises(ImageError, match="200 times") as caught:
            ask()
        assert caught.value.code == "image_broken"


@pytest.mark.parametrize("name", sorted(SAID["patches"]))
def test_patches_are_the_references(name: str) -> None:
    said = SAID["patches"][name]
    layout = NativeLayout(min_pixels=said["min_pixels"], max_pixels=said["max_pixels"])
    patches = layout.prepare(open_image(picture(name)))
    assert [list(layout.grid(*said["size_wh"]))] == vectors()[f"{name}/grid_thw"].tolist()
    assert patches.dtype == np.uint8 and list(patches.shape) == said["shape"]
    assert np.abs(normalized(layout, patches) - vectors()[f"{name}/patches"]).max() < 1e-6
    resized = vectors()[f"{name}/resized_uint8_hwc"]
    assert np.array_equal(patches, NativeLayout(max_pixels=1 << 24).prepare(PIL.Image.fromarray(resized)))


@pytest.mark.parametrize("name", sorted(SAID["multimixqa"]))
def test_the_capped_way_is_the_references(name: str) -> None:
    said = SAID["multimixqa"][name]
    low, high = said["processor_min_max"]
    layout = NativeLayout(
        min_pixels=low,
        max_pixels=high,
        image_resolution=said["effective_cap"],
        first_min_pixels=said["args_min_pixels"],
        first_max_pixels=said["args_max_pixels"],
    )
    shown = open_image(picture(name))
    assert [list(layout.grid(*shown.size))] == said["grid_thw"]
    assert np.abs(normalized(layout, layout.prepare(shown)) - vectors()[f"{name}/patches"]).max() < 1e-6


def test_what_a_cap_made_thin_is_widened() -> None:
    """5000 x 40 becomes 5012 x 28, capped 1000 x 5, 1000 x 28. 28000 x 140 is 200 to 1; capped to 27999 it is 27999 x
    139 and more than that, so it becomes 180 * 139 x 139."""
    assert NativeLayout(image_resolution=8000).grid(40, 5000) == (1, 358, 2)
    assert NativeLayout(image_resolution=1000).grid(5000, 40) == (1, 2, 72)
    wide = NativeLayout(image_resolution=27999, first_max_pixels=1 << 28, max_pixels=1 << 28)
    assert wide.grid(28000, 140) == (1, 10, 2 * round(139 * 180 / 28))
    assert wide.grid(140, 28000) == (1, 2 * round(139 * 180 / 28), 10)


SIZES = random.Random(7)


@pytest.mark.parametrize("limits", [(3136, 100_000), (50_000, 200_000), (28 * 28, 28 * 28 * 16)])
def test_the_stock_processor_gives_the_same(limits: tuple[int, int]) -> None:
    low, high = limits
    stock = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high, temporal_patch_size=1)
    layout = NativeLayout.from_processor(stock)
    assert layout == NativeLayout(min_pixels=low, max_pixels=high)
    for seed in range(12):
        size = int(SIZES.uniform(5, 500)), int(SIZES.uniform(5, 500))
        shown = noise(*size, seed)
        wanted = stock(images=[shown], return_tensors="np")
        patches = layout.prepare(shown)
        assert wanted["image_grid_thw"].tolist() == [list(layout.grid(*size))]
        assert np.abs(normalized(layout, patches) - wanted["pixel_values"]).max() < 1e-6
        assert layout.tokens(*size) * 4 == len(patches)
        assert layout.blank(*size).shape == patches.shape and layout.blank(*size).dtype == np.uint8


def test_alpha_is_dropped_where_the_stock_processor_lays_it_on_white() -> None:
    stock = Qwen2VLImageProcessorPil(temporal_patch_size=1)
    layout = NativeLayout.from_processor(stock)
    with PIL.Image.open(picture("p4").path) as read:
        assert read.mode == "RGBA"
        shown = (read, read.convert("RGB"))
        on_white, dropped = (stock(images=[one], return_tensors="np")["pixel_values"] for one in shown)
    ours = normalized(layout, layout.prepare(open_image(picture("p4"))))
    assert np.abs(ours - dropped).max() < 1e-6 < np.abs(ours - on_white).max()


def test_a_blank_is_the_mean_colour() -> None:
    layout = NativeLayout(max_pixels=12544)
    wanted = PIL.Image.new("RGB", (300, 180), tuple(int(255 * mean) for mean in CLIP_MEAN))
    assert np.array_equal(layout.blank(300, 180), layout.prepare(wanted))
    assert np.abs(normalized(layout, layout.blank(300, 180))).max() < 0.02


def test_limits_of_old_and_new_processor_files() -> None:
    old = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "min_pixels": 6272, "max_pixels": 2560000}
    new = {"size": {"shortest_edge": 6272, "longest_edge": 2560000}, "temporal_patch_size": 1}
    layout = NativeLayout.from_processor({**old, "temporal_patch_size": 1})
    assert (layout.min_pixels, layout.max_pixels) == (6272, 2560000) and layout.needs_size
    assert NativeLayout.from_processor(new) == layout
    assert NativeLayout.from_processor(new, image_resolution=512) == replace(layout, image_resolution=512)
    for wrong, reason in (
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1.0}, "1/255"),
        ({"temporal_patch_size": 2}, "temporal_patch_size is 2"),
        ({"size": {"shortest_edge": 3136}}, "max_pixels"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "min_pixels = 9"),
    ):
        with pytest.raises(ValueError, match=reason):
            NativeLayout.from_processor({**new, **wrong})


def test_opened_from_a_folder(tmp_path: Path) -> None:
    """Files of `transformers` 4 and 5, alone and as part of a processor."""
    layout = NativeLayout(min_pixels=3136, max_pixels=2560000)
    assert open_native(GOLDEN / "processor") == layout  # size.longest_edge is 12845056 there
    assert open_native(tmp_path) is None
    stock = Qwen2VLImageProcessorPil(max_pixels=2560000, temporal_patch_size=1)
    stock.save_pretrained(tmp_path)
    assert open_native(tmp_path) == layout
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": stock.to_dict()}))
    assert open_native(tmp_path, image_resolution=1000) == replace(layout, image_resolution=1000)
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"image_processor_type": "CLIPImageProcessor"}}'
    )
    assert open_native(tmp_path) is None
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"processor_config\.json"):
        open_native(tmp_path)


def test_every_setting_is_told() -> None:
    """The index is made anew when the layout's text changes."""
    layout = NativeLayout()
    changes = {"patch": 16, "merge": 1, "min_pixels": 9, "max_pixels": 9999, "resample": 2, "image_resolution": 99}
    changes |= {"mean": (0.0,) * 3, "std": (1.0,) * 3, "first_min_pixels": 1, "first_max_pixels": 2}
    assert set(changes) == set(NativeLayout.__dataclass_fields__)
    assert all(repr(replace(layout, **{key: value})) != repr(layout) for key, value in changes.items())


def test_the_header_alone_tells_the_size() -> None:
    assert image_size(picture("p2")) == (300, 180)
