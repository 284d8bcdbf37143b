"""Decoding, resizing and padding against the reference's pixels, against stock processors, and on broken files."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vistune import images
from vistune.images import (
    CLIP_MEAN,
    CLIP_STD,
    FixedLayout,
    ImageError,
    image_header,
    image_size,
    normalize,
    open_image,
)
from vistune.samples import Image

GOLDEN = Path(__file__).parent / "golden" / "llava" / "images"
SHEET = json.loads((GOLDEN / "images.json").read_text(encoding="utf-8"))
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.suffix in (".png", ".jpg"))
SMALL = {"size": 56, "resize": 56, "patch": 14}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, np.ndarray]]:
    kinds = ("rgb_uint8", "pixel_values_square", "pixel_values_pad")
    return {kind: dict(np.load(GOLDEN / f"{kind}.npz")) for kind in kinds}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_decoded_as_the_reference(name: str, as_bytes: bool, expected: dict) -> None:
    path = GOLDEN / name
    image = Image(data=path.read_bytes()) if as_bytes else Image(path=str(path))
    assert np.array_equal(np.asarray(open_image(image)), expected["rgb_uint8"][name])
    assert image_size(image) == expected["rgb_uint8"][name].shape[1::-1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["square", "pad"])
def test_pixels_of_the_reference(name: str, mode: str, expected: dict) -> None:
    layout = FixedLayout(mode=mode, **SMALL)
    pixels = layout.prepare(open_image(Image(path=str(GOLDEN / name))))
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 56, 56) and pixels.flags.c_contiguous
    got = normalize(torch.from_numpy(pixels)[None], layout, torch.float32)[0].numpy()
    assert np.abs(got - expected[f"pixel_values_{mode}"][name]).max() <= 1e-6


@pytest.mark.parametrize(("size", "resize"), [(56, 56), (56, 64), (336, 336), (50, None)])
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_padding_is_resizing_the_padded_square(size: int, resize: int | None, resample: int) -> None:
    """Row by row it costs less than that, and must give the same bytes."""
    layout = FixedLayout(mode="pad", size=size, resize=resize, resample=resample)
    rng = np.random.default_rng(resample)
    sizes = [(640, 480), (500, 333), (57, 56), (300, 7), (1, 2), (2, 1), (480, 640), *rng.integers(1, 400, (6, 2))]
    for width, height in sizes:
        image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        side = max(image.size)
        square = PIL.Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        wide = resize or size
        left = (wide - size) // 2
        wanted = square.resize((wide, wide), resample).crop((left, left, left + size, left + size))
        assert np.array_equal(layout.prepare(image), np.asarray(wanted).transpose(2, 0, 1))


@pytest.mark.parametrize("entry", SHEET["images"], ids=lambda entry: entry["file"])
def test_token_counts_of_the_reference(entry: dict) -> None:
    for mode in ("square", "pad"):
        assert FixedLayout(mode=mode, **SMALL).tokens(*entry["size_wh"]) == entry[f"tokens_{mode}"]


def test_token_counts_of_llava_1_5() -> None:
    assert FixedLayout().tokens(640, 480) == 576  # ViT-L/14 at 336: 24 x 24
    assert FixedLayout(extra_tokens=1).tokens(640, 480) == 577
    assert FixedLayout(size=224, resize=224).tokens(1, 1) == 256
    assert not FixedLayout.needs_size


STOCK = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size={"height": 56, "width": 56}),
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    "llava-pad": LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True),
    "siglip": SiglipImageProcessorPil(size={"height": 56, "width": 56}),
    "plain-pixels": CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_normalize=False
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", STOCK)
def test_from_processor_gives_the_processors_pixels(kind: str, name: str) -> None:
    processor = STOCK[kind]
    layout = FixedLayout.from_processor(processor, patch=14)
    picture = open_image(Image(path=str(GOLDEN / name)))
    stock = np.asarray(processor(picture)["pixel_values"][0])
    got = normalize(torch.from_numpy(layout.prepare(picture))[None], layout, torch.float32)[0].numpy()
    assert layout.mode == ("pad" if kind == "llava-pad" else "square")
    assert np.abs(got - stock).max() <= 1e-6


def test_mode_may_be_chosen_over_the_processor() -> None:
    assert FixedLayout.from_processor(STOCK["clip"], patch=14, mode="pad").mode == "pad"
    assert FixedLayout.from_processor(STOCK["llava-pad"], patch=14, mode="square").mode == "square"
    no_crop = CLIPImageProcessorPil(size={"shortest_edge": 56}, do_center_crop=False)
    assert FixedLayout.from_processor(no_crop, patch=14, mode="pad").size == 56


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_rescale": False}, "1/255"),
        ({"rescale_factor": 1 / 127.5}, "1/255"),
        ({"do_center_crop": False}, "pad"),
        ({"crop_size": {"height": 56, "width": 28}}, "56 x 28 is not square"),
        ({"size": {"shortest_edge": 40}}, "less than the crop of 56"),
        ({"size": {"longest_edge": 40}}, "not understood"),
    ],
)
def test_processors_that_give_no_fixed_size(settings: dict, message: str) -> None:
    read = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True}
    read |= {"resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD} | settings
    with pytest.raises(ValueError, match=message):
        FixedLayout.from_processor(read, patch=14)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="choose square or pad"):
        FixedLayout(mode="anyres")  # type: ignore[arg-type]


def test_blank_is_nearly_zero_after_normalisation() -> None:
    layout = FixedLayout(**SMALL)
    blank = layout.blank()
    assert blank.shape == (3, 56, 56) and blank.dtype == np.uint8
    assert blank[:, 0, 0].tolist() == [122, 116, 104]  # the reference's canvas for pad
    assert normalize(torch.from_numpy(blank)[None], layout, torch.bfloat16).abs().max() < 0.02


def test_normalize_in_the_wanted_dtype() -> None:
    pixels = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    got = normalize(pixels, FixedLayout(), torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.shape == (2, 3, 4, 4)
    white = [(1 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    assert got[0, :, 0, 0].tolist() == pytest.approx(white, rel=0.01)


def saved(picture: PIL.Image.Image, kind: str = "PNG", **more) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **more)
    return stream.getvalue()


RED = PIL.Image.new("RGB", (8, 6), (200, 10, 20))
GRAY = PIL.Image.new("L", (8, 6), 77)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (saved(RED), (200, 10, 20)),
        (saved(RED.quantize(4)), (200, 10, 20)),
        (saved(RED.convert("RGBA")), (200, 10, 20)),
        (saved(PIL.Image.new("RGBA", (8, 6), (200, 10, 20, 0))), (200, 10, 20)),  # alpha dropped, not composited
        (saved(GRAY), (77, 77, 77)),
        (saved(PIL.Image.new("LA", (8, 6), (77, 9))), (77, 77, 77)),
        (saved(PIL.Image.new("1", (8, 6), 1)), (255, 255, 255)),
        (saved(PIL.Image.fromarray(np.full((6, 8), 77 * 256 + 5, np.uint16))), (77, 77, 77)),  # 16 bits
        (saved(RED.convert("CMYK"), "TIFF"), (200, 10, 20)),
        (saved(RED.quantize(4), "GIF"), (200, 10, 20)),
    ],
    ids=["rgb", "palette", "rgba", "see-through", "gray", "gray-alpha", "bits", "gray16", "cmyk", "gif"],
)
def test_every_kind_becomes_rgb(data: bytes, colour: tuple[int, int, int]) -> None:
    picture = open_image(Image(data=data))
    assert picture.mode == "RGB" and picture.size == (8, 6)
    assert picture.getpixel((3, 3)) == colour


def test_orientation_in_exif_is_ignored() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert open_image(Image(data=saved(RED, "JPEG", exif=exif))).size == (8, 6)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its body holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (saved(NOISE, "JPEG")[:900], "truncated"),
        (saved(NOISE)[:2000], "truncated|broken|Truncated"),
        (huge_png(40_000, 40_000), "more than 500,000,000 pixels.*1600000000"),
        (huge_png(30_000, 20_000), "30000 x 20000"),
        (saved(PIL.Image.new("F", (4, 4)), "TIFF"), "mode F"),
    ],
    ids=["empty", "html", "jpeg-cut", "png-cut", "bomb", "large", "float"],
)
def test_broken_bytes(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        open_image(Image(data=data, path="folder/x.jpg"))
    assert (caught.value.code, caught.value.path) == ("image_broken", "folder/x.jpg")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.code, copy.path, str(copy)) == ("image_broken", "folder/x.jpg", str(caught.value))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_never_raise_anything_else(seed: int) -> None:
    draw = np.random.default_rng(seed)
    kind = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")[seed % 6]
    data = np.frombuffer(saved(NOISE, kind), np.uint8).copy()
    data[draw.integers(0, min(len(data), 300), 6)] = draw.integers(0, 255, 6)
    try:
        assert open_image(Image(data=data.tobytes())).mode == "RGB"
    except ImageError as error:
        assert error.code == "image_broken"


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file") as caught:
        open_image(Image(path=str(tmp_path / "none.png")))
    assert caught.value.code == "image_missing"
    with pytest.raises(ImageError) as caught:
        open_image(Image())
    assert caught.value.code == "image_missing"
    with pytest.raises(ImageError) as caught:
        open_image(Image(path=str(tmp_path)))  # a folder
    assert caught.value.code == "image_broken"


def test_remote_paths() -> None:
    import fsspec

    with fsspec.open("memory://pictures/red.png", "wb") as stream:
        stream.write(saved(RED))
    assert open_image(Image(path="memory://pictures/red.png")).getpixel((0, 0)) == (200, 10, 20)


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_long_and_thin(mode: str) -> None:
    layout = FixedLayout(mode=mode, **SMALL)
    assert layout.prepare(PIL.Image.new("RGB", (300, 1))).shape == (3, 56, 56)
    side = 30_000 if mode == "pad" else 10_000_000
    with pytest.raises(ImageError, match="too long and thin"):
        layout.prepare(PIL.Image.new("RGB", (side, 1)))


def test_a_tall_strip_is_padded_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as its whole square would be, without that square: 1 x 20,000 pixels would take 1.6 GB."""
    monkeypatch.setattr(images, "_BAND", 700)
    tall = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (211, 17, 3), dtype=np.uint8))
    layout = FixedLayout(mode="pad", size=56, resize=56)
    square = PIL.Image.new("RGB", (211, 211), (122, 116, 104))
    square.paste(tall, ((211 - 17) // 2, 0))
    whole = np.asarray(square.resize((56, 56), layout.resample)).transpose(2, 0, 1)
    assert np.array_equal(layout.prepare(tall), whole)


def test_a_file_that_begins_as_one_format_is_never_read_as_another() -> None:
    """Photo CD is known by bytes 2048 on, so a WebP that goes no further than its name could be one too."""
    disc = bytearray(b"RIFF\x00\x10\x00\x00WEBPVP9 ".ljust(2048, b"\0") + b"PCD_".ljust(1 << 20, b"\0"))
    assert PIL.Image.open(io.BytesIO(disc)).format == "PCD"
    with pytest.raises(ImageError):
        image_header(Image(data=bytes(disc)))
