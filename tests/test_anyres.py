"""Tiles: their pixels and counts against the original's values, and against stock LLaVA-NeXT for any size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, LlavaNextProcessor, SiglipImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image

from vistune.anyres import AnyresLayout, best_pinpoint, standard_pinpoints, unpadded
from vistune.images import normalize, open_image
from vistune.samples import Image

GOLDEN = Path(__file__).parent / "golden" / "llava" / "images"
SHEET = json.loads((GOLDEN / "images.json").read_text(encoding="utf-8"))
SIZES = json.loads((GOLDEN / "anyres_arithmetic.json").read_text(encoding="utf-8"))
SMALL = AnyresLayout(size=56, pinpoints=standard_pinpoints(56))
LARGE = AnyresLayout()
WIDE = AnyresLayout(size=384, pinpoints=tuple((384 * h, 384 * w) for h in range(1, 5) for w in range(1, 5)))
PUBLISHED = AnyresLayout(pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))


def stock_images(layout: AnyresLayout) -> LlavaNextImageProcessorPil:
    edge = {"height": layout.size, "width": layout.size}
    points = [list(each) for each in layout.pinpoints]
    return LlavaNextImageProcessorPil(size=edge, crop_size=edge, image_grid_pinpoints=points)


def stock_tokens(layout: AnyresLayout, width: int, height: int) -> int:
    """What the stock processor lays for a picture behind a CLIP tower."""
    half = SimpleNamespace(image_processor=stock_images(layout), patch_size=layout.patch, num_additional_image_tokens=1)
    half._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(half, *sizes)
    return LlavaNextProcessor._get_number_of_features(half, height, width, layout.size, layout.size) - 1


@pytest.mark.parametrize("entry", SHEET["images"], ids=lambda entry: entry["file"])
def test_pixels_and_counts_of_the_original(entry: dict) -> None:
    picture = open_image(Image(path=str(GOLDEN / entry["file"])))
    wanted = np.load(GOLDEN / "pixel_values_anyres.npz")[entry["file"]]
    pixels = SMALL.prepare(picture)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    got = normalize(torch.from_numpy(pixels), SMALL, torch.float32).numpy()
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-6
    assert SMALL.grid(*picture.size) == (entry["n_tiles_with_base"], picture.height, picture.width)
    assert SMALL.tokens(*picture.size) == entry["tokens_anyres_spatial_unpad"]


@pytest.mark.parametrize(("layout", "key"), [(SMALL, "toy"), (LARGE, "llava16")])
def test_arithmetic_of_the_original(layout: AnyresLayout, key: str) -> None:
    """The original says (width, height) of canvases, and its order decides ties."""
    for entry in SIZES:
        (width, height), wanted = entry["size_wh"], entry[key]
        assert list(best_pinpoint(height, width, layout.pinpoints)[::-1]) == wanted["best_resolution_wh"]
        assert [len(side) for side in layout.covered(width, height)] == wanted["unpadded_hw"]
        assert layout.tokens(width, height) == wanted["tokens_spatial_unpad"]


def test_the_most_that_a_picture_of_llava_1_6_takes() -> None:
    assert LARGE.tokens(672, 672) == 576 + 48 * 48 + 48 == 2928


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), layout=st.sampled_from((SMALL, LARGE, PUBLISHED, WIDE)))
def test_counts_are_the_stock_ones_for_any_size(width: int, height: int, layout: AnyresLayout) -> None:
    points = [list(each) for each in layout.pinpoints]
    tiles, high, wide = layout.grid(width, height)
    assert tiles == image_size_to_num_patches((height, width), points, layout.size)
    assert (high, wide) == (height, width)
    assert layout.tokens(width, height) == stock_tokens(layout, width, height)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 81), columns=st.integers(1, 81), height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_the_features_kept_are_the_stock_ones(rows: int, columns: int, height: int, width: int) -> None:
    places = torch.arange(rows * columns).view(1, rows, columns)
    kept_rows, kept_columns = unpadded(rows, columns, height, width)
    ours = places[:, kept_rows.start : kept_rows.stop, kept_columns.start : kept_columns.stop]
    assert torch.equal(ours, unpad_image(places, (height, width)))


def test_where_the_original_cuts_off_and_the_stock_class_rounds() -> None:
    """55 x 176 pixels on 48 rows of 24 features: 55 * (48 / 176) comes out as 14.999999999999998, which is 15."""
    assert LARGE.tokens(55, 176) == stock_tokens(LARGE, 55, 176) == 1392
    assert 1392 - 1296 == 2 * 48  # what the original keeps less: a column on either side of 48 rows


def test_small_pictures_tie_and_the_first_canvas_is_taken() -> None:
    assert best_pinpoint(50, 50, LARGE.pinpoints) == (672, 336)  # as the original: (336, 672) said as (width, height)
    assert best_pinpoint(50, 50, PUBLISHED.pinpoints) == (336, 672)  # as the published llava-hf folders


@pytest.mark.parametrize("size", [(97, 140), (300, 41), (1, 90), (56, 56), (57, 113), (900, 700)])
@pytest.mark.parametrize("layout", [SMALL, AnyresLayout(size=28, pinpoints=((28, 56), (84, 84), (28, 28)))])
def test_pixels_are_the_stock_processors(layout: AnyresLayout, size: tuple[int, int]) -> None:
    draw = np.random.default_rng(size[0])
    picture = PIL.Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    stock = np.asarray(stock_images(layout)(picture)["pixel_values"][0])
    got = normalize(torch.from_numpy(layout.prepare(picture)), layout, torch.float32).numpy()
    assert got.shape == stock.shape and np.abs(got - stock).max() <= 1e-6


def test_a_blank_has_the_shape_of_the_picture_it_stands_for() -> None:
    for size in ((97, 140), (50, 50), (300, 20)):
        blank = SMALL.blank(*size)
        assert blank.shape == SMALL.prepare(PIL.Image.new("RGB", size)).shape and blank.dtype == np.uint8
        assert (blank == np.array([122, 116, 104], np.uint8)[None, :, None, None]).all()


def test_normalizing_tiles_is_normalizing_each() -> None:
    pixels = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    each = torch.stack([normalize(one, SMALL, torch.float32) for one in pixels])
    assert torch.equal(normalize(pixels, SMALL, torch.float32), each)


def test_from_processor() -> None:
    assert AnyresLayout.from_processor(stock_images(WIDE), patch=14) == WIDE
    tower = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    assert AnyresLayout.from_processor(tower, patch=14) == SMALL
    siglip = AnyresLayout.from_processor(SiglipImageProcessorPil(size={"height": 64, "width": 64}), patch=16)
    assert (siglip.size, siglip.mean, siglip.pinpoints[0]) == (64, (0.5, 0.5, 0.5), (128, 64))
    chosen = AnyresLayout.from_processor(tower, patch=14, pinpoints=[[56, 112]])
    assert chosen.pinpoints == ((56, 112),)
    with pytest.raises(ValueError, match="no square tiles"):
        AnyresLayout.from_processor(CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size=56), patch=14)


@pytest.mark.parametrize("points", [((56, 100),), ((56,),), ((0, 56),), ()])
def test_pinpoints_that_are_no_whole_tiles_are_refused(points: tuple) -> None:
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        AnyresLayout(size=56, pinpoints=points)


@pytest.mark.parametrize("size", [(97, 140), (200, 60), (50, 50), (112, 112), (300, 90)])
def test_cuts_lie_where_tiles_meet(size: tuple[int, int]) -> None:
    """A picture that grows red to the right and green downwards says itself where its tiles end."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    high, wide = (side // SMALL.size for side in SMALL.canvas(width, height))
    tiles = SMALL.prepare(PIL.Image.fromarray(pixels))[1:].reshape(high, wide, 3, 56, 56)
    across, down = SMALL.cuts(width, height)
    assert (len(across), len(down)) == (wide - 1, high - 1)
    for i, share in enumerate(across):
        ends, begins = tiles[:, i, 0, :, -1].max(), tiles[:, i + 1, 0, :, 0].max()
        assert ends / 255 == pytest.approx(share, abs=0.03) == begins / 255
    for i, share in enumerate(down):
        ends, begins = tiles[i, :, 1, -1].max(), tiles[i + 1, :, 1, 0].max()
        assert ends / 255 == pytest.approx(share, abs=0.03) == begins / 255
