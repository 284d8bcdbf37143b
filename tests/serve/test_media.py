"""Pictures from strangers: what is taken, what is refused and why; files made to cost more than they show."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistune.images import open_image
from vistune.serve.limits import Limits
from vistune.serve.pictures import headers, media
from vistune.serve.pictures.media import Media, Taken
from vistune.serve.refused import Refused

HERE = "messages[0].content[1].image_url"
NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SECRET = "Sesame-opens-the-door"


def saved(form: str, picture: PIL.Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (picture or PIL.Image.fromarray(NOISE)).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 0, rows: bytes | None = None) -> bytes:
    if rows is None:
        rows = bytes(1 + -(-width * depth // 8)) * height
    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + b"".join(more) + pixels + chunk(b"IEND", b"")


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def ours() -> Media:
    return Media(Limits())


def gathered(ours: Media, *urls: str) -> list[Taken]:
    return asyncio.run(ours.gather([(f"messages[{at}]", one) for at, one in enumerate(urls)]))


def refused(call: Callable[[], object], status: int, code: str, match: str = ".") -> Refused:
    with pytest.raises(Refused, match=match) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.param and SECRET not in str(caught.value.body())
    return caught.value


def memory_of(call: Callable[[], object]) -> int:
    """Bytes that Python and Pillow's Python side allocate at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", FORMATS)
def test_the_four_formats_are_taken_as_they_are(ours: Media, form: str) -> None:
    data = saved(form)
    [taken] = gathered(ours, url(data, f"image/{form.lower()}"))
    assert (taken.width, taken.height) == (40, 24)
    assert taken.image.data is not None and not taken.image.path
    assert taken.digest == hashlib.sha256(taken.image.data).digest()
    whole = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(open_image(taken.image)), np.asarray(whole))


def test_the_bytes_decide_and_not_the_name(ours: Media) -> None:
    data = saved("JPEG")
    names = ["image/png", "IMAGE/JPG", "image/gif"]
    assert len({one.digest for one in gathered(ours, *(url(data, name) for name in names))}) == 1
    assert gathered(ours, url(data).replace("data:", "DATA:").replace("base64", "Base64"))


def test_pictures_come_back_in_their_order(ours: Media) -> None:
    sizes = [(30, 7), (2, 90), (5, 5)]
    taken = gathered(ours, *(url(png(*size)) for size in sizes))
    assert [(one.width, one.height) for one in taken] == sizes


ADDRESSES = {
    "": "empty",
    "https://example.org/a.png": "https: is not taken.*fetches none",
    "http://127.0.0.1:80/a.png": "http: is not taken",
    "file://localhost/etc/passwd": "file: is not taken",
    "ftp://example.org/a.png": "ftp: is not taken",
    "javascript:alert(1)": "javascript: is not taken",
    f"/srv/{SECRET}.png": "this is no data URL",
    "./a.png": "this is no data URL",
    "C:\\pictures\\a.png": "this is no data URL",
    "image/png;base64,AAAA": "this is no data URL",
    " data:image/png;base64,AAAA": "this is no data URL",
    "data:,AAAA": "another type",
    "data:image/svg+xml;base64,AAAA": "another type",
    "data:image/tiff;base64,AAAA": "another type",
    "data:text/html;base64,AAAA": "another type",
    "data:image/png,AAAA": "another type",
    "data:image/png;charset=utf-8;base64,AAAA": "another type",
    "data:image/png;base64 ,AAAA": "another type",
    "data:image/\u0131mage;base64,AAAA": "another type",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_but_data_urls_is_taken(ours: Media, address: str) -> None:
    refused(lambda: gathered(ours, address), 400, "picture_url", ADDRESSES[address])


WRONG_TEXTS = {
    "": "nothing",
    "QUJ": "multiple of 4",
    "QUI=QUI=": "characters",
    "QU I": "characters",
    "QUJD\n": "multiple of 4",
    "QUJ\n": "characters",
    "QU-_": "characters",
    "QUJ%": "characters",
    "Q===": "characters",
    "====": "characters",
    "QUJ\u00e9": "characters",
    "QUJ\x00": "characters",
    "QUJ=": "belong to nothing",
    "QX==": "belong to nothing",
}


@pytest.mark.parametrize("text", WRONG_TEXTS)
def test_base64_is_read_strictly(ours: Media, text: str) -> None:
    refused(lambda: ours.decoded(text, HERE), 400, "picture_base64", WRONG_TEXTS[text])
    refused(lambda: gathered(ours, f"data:image/png;base64,{text}"), 400, "picture_base64")


@pytest.mark.parametrize("length", [1, 2, 3, 47, 48, 49, 95, 96, 97, 500])
def test_long_texts_are_read_piece_by_piece(ours: Media, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(media, "_SLICE", 64)
    data = random.Random(length).randbytes(length)
    text = base64.b64encode(data).decode()
    assert ours.decoded(text, HERE) == data
    for at in range(0, len(text) - 4, 7):
        for wrong in "= -\n":
            refused(
                lambda at=at, wrong=wrong: ours.decoded(text[:at] + wrong + text[at + 1 :], HERE), 400, "picture_base64"
            )
    refused(lambda: ours.decoded("QUI=" * 16 + text, HERE), 400, "picture_base64")


def test_others_go_on_while_a_long_text_is_read(ours: Media) -> None:
    """The event loop ticks while a picture of 20 MB is taken in."""
    text = base64.b64encode(random.Random(0).randbytes((20 << 20) - 2)).decode()
    waits: list[float] = []

    async def ticking() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            waits.append(time.perf_counter() - began)

    async def both() -> None:
        ticker = asyncio.create_task(ticking())
        with pytest.raises(Refused, match="not a PNG"):
            await ours.read([(HERE, text)])
        ticker.cancel()

    asyncio.run(both())
    assert len(waits) > 3 and sorted(waits)[len(waits) // 2] < 0.05


def test_bytes_and_pictures_are_counted_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Media(Limits(picture_bytes=1000, pictures=2))
    monkeypatch.setattr(media, "_base64", lambda *_: pytest.fail("it was read"))
    long = "data:image/png;base64," + "A" * 1340
    refused(lambda: gathered(small, long), 413, "picture_bytes", "1,000 bytes")
    error = refused(lambda: gathered(small, *[long] * 3), 400, "too_many_pictures", "3 pictures.* 2")
    assert error.param == "messages[2]"
    refused(lambda: small.check(bytes(1001), HERE), 413, "picture_bytes")


def test_the_first_that_is_wrong_is_named(ours: Media) -> None:
    good, bad = url(png(3, 3)), "data:image/png;base64,AAAA"
    assert refused(lambda: gathered(ours, good, bad, bad), 400, "picture_broken").param == "messages[1]"
    assert refused(lambda: gathered(ours, bad, good, "nothing"), 400, "picture_url").param == "messages[2]"


@pytest.mark.parametrize(
    ("width", "height", "code"),
    [
        (12_000, 12_000, "picture_pixels"),
        (2**31 - 1, 2**31 - 1, "picture_pixels"),
        (1, 40_000_000, "picture_shape"),
        (300, 1, "picture_shape"),
        (1, 201, "picture_shape"),
        (0, 5, "picture_broken"),
    ],
)
def test_a_bomb_is_refused_by_its_header(ours: Media, width: int, height: int, code: str) -> None:
    """12,000 x 12,000 pixels in 17 kB, as one would be made; nothing of their size is ever held."""
    bomb = png(width, height, depth=1, rows=bytes(1501 * 12_000) if width == 12_000 else b"")
    assert len(bomb) < 18_000
    assert memory_of(lambda: refused(lambda: ours.check(bomb, HERE), 400, code)) < 1 << 20
    began = time.thread_time()
    refused(lambda: ours.check(bomb, HERE), 400, code)
    assert time.thread_time() - began < 0.05
    refused(lambda: gathered(ours, url(bomb)), 400, code)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_says_its_size_in_its_header(ours: Media, form: str) -> None:
    """The sizes of a real file are overwritten: 15,000 x 15,000."""
    data, side = bytearray(saved(form)), 15_000
    if form == "PNG":
        data[16:24] = struct.pack(">II", side, side)
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif form == "WEBP":
        data[26:30] = struct.pack("<HH", side, side)
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    assert memory_of(lambda: refused(lambda: ours.check(bytes(data), HERE), 400, "picture_pixels")) < 1 << 20


def test_a_webp_that_is_large_in_its_outer_header_is_never_opened(ours: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader would make room for two canvases before anybody could ask for their size."""
    monkeypatch.setattr(media, "image_size", lambda _: pytest.fail("it was opened"))
    canvas = struct.pack("<HBHB", (16_383 - 1) & 0xFFFF, 0, 16_382, 0)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    refused(lambda: ours.check(b"RIFF" + struct.pack("<I", len(body)) + body, HERE), 400, "picture_pixels", "16383")


def test_a_gif_whose_first_frame_is_larger_than_it_says(ours: Media) -> None:
    data = bytearray(saved("GIF"))
    at = data.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 40, 24))
    data[at + 5 : at + 9] = struct.pack("<HH", 20_000, 20_000)
    refused(lambda: ours.check(bytes(data), HERE), 400, "picture_pixels")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_a_film_the_first_picture_is_taken(ours: Media, form: str) -> None:
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = saved(form, frames[0], save_all=True, append_images=frames[1:] * 50, lossless=True)
    taken = ours.check(data, HERE)
    assert open_image(taken.image).getpixel((5, 5)) == (255, 0, 0)


def test_a_jpeg_of_several_pictures_is_its_first(ours: Media) -> None:
    first, second = PIL.Image.new("RGB", (20, 10), (200, 0, 0)), PIL.Image.new("RGB", (30, 10))
    data = saved("MPO", first, save_all=True, append_images=[second])
    assert PIL.Image.open(io.BytesIO(data)).format == "MPO"
    taken = ours.check(data, HERE)
    assert taken.image.data and len(taken.image.data) < len(data) / 2
    assert (taken.width, taken.height) == (20, 10)


def directory_of_copies(names: int) -> bytes:
    """EXIF whose every entry names nearly all of its bytes."""
    length = 8 + 2 + 12 * names + 4
    entries = b"".join(struct.pack("<HHII", tag, 7, length - 8, 8) for tag in range(1, names + 1))
    return b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, names) + entries + bytes(4)


def test_what_is_no_pixels_is_left_out_of_a_jpeg(ours: Media) -> None:
    """A directory that names each of its bytes 2,000 times is read by Pillow as 48 MB."""
    plain = saved("JPEG")
    exif = directory_of_copies(2_000)
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    assert memory_of(lambda: PIL.Image.open(io.BytesIO(data))) > 40 << 20
    assert memory_of(lambda: ours.check(data, HERE)) < 1 << 20
    taken = ours.check(data + b"a film follows" * 1000, HERE)
    assert taken.digest == ours.check(plain, HERE).digest
    assert np.array_equal(np.asarray(open_image(taken.image)), np.asarray(PIL.Image.open(io.BytesIO(plain))))


def test_what_is_no_pixels_is_left_out_of_a_png(ours: Media) -> None:
    """Colour profiles and texts that inflate to a thousand times their size."""
    much = zlib.compress(bytes(4 << 20), 9)
    profile = chunk(b"iCCP", b"x\0\0" + much)
    data = png(5, 4, *[profile] * 20, *[chunk(b"zTXt", b"x\0\0" + much)] * 20)
    assert memory_of(lambda: ours.check(data, HERE)) < 1 << 20
    assert ours.check(data, HERE).image.data == png(5, 4)


def test_of_two_sizes_of_a_png_the_first_counts(ours: Media) -> None:
    """Pillow takes the last one that comes before the pixels, and reads on behind them."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    for data in (png(5, 4, size), png(5, 4)[:-12] + size + png(5, 4)[-12:]):
        assert ours.check(data, HERE).image.data == png(5, 4)


def test_colours_that_hang_on_a_segment_stay_as_they_are(ours: Media) -> None:
    """Adobe's segment turns a CMYK JPEG around; a palette's transparency is dropped, not drawn."""
    cmyk = saved("JPEG", PIL.Image.fromarray(NOISE).convert("CMYK"))
    palette = saved("PNG", PIL.Image.fromarray(NOISE).quantize(16), transparency=3)
    for data in (cmyk, palette):
        whole = PIL.Image.open(io.BytesIO(data)).convert("RGB")
        assert np.array_equal(np.asarray(open_image(ours.check(data, HERE).image)), np.asarray(whole))


def test_a_jpeg_of_very_many_scans_is_refused(ours: Media) -> None:
    """Ten bytes each, and every one may change 40 million pixels."""
    plain = saved("JPEG", PIL.Image.fromarray(NOISE), progressive=True)
    scan = plain[(at := plain.rindex(b"\xff\xda")) : -2]
    assert ours.check(plain, HERE)
    assert len(scan) and at
    refused(lambda: ours.check(plain[:-2] + scan * 200 + plain[-2:], HERE), 400, "picture_broken", "scans")


def in_time(call: Callable[[], object]) -> None:
    began = time.thread_time()
    call()
    assert time.thread_time() - began < 1.5


def test_very_many_parts_are_not_read(ours: Media) -> None:
    size = 3 << 20
    jpeg = saved("JPEG")
    gif = saved("GIF")
    at = gif.index(b"\x2c\0\0\0\0")
    comments = gif[:at] + b"\x21\xfe\x01a\x00" * (size // 5) + gif[at:]
    blocks = gif[:at] + b"\x21\xfe" + b"\x01a" * (size // 2) + b"\0" + gif[at:]
    for data, reason in (
        (png(4, 4, chunk(b"tEXt", b"") * (size // 12)), "parts"),
        (jpeg[:2] + b"\xff\xfe\0\x02" * (size // 4) + jpeg[2:], "segments"),
        (comments, "parts"),
        (blocks, "parts"),
        (b"\xff\xd8\xff" + bytes(size), "cut off"),
        (jpeg[:-2] + b"\xff\0" * (size // 2), "cut off"),
    ):
        in_time(lambda data=data, reason=reason: refused(lambda: ours.check(data, HERE), 400, "picture_broken", reason))


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "PCX", "TGA", "ICO", "EPS", "SGI", "IM", "DDS", "PDF"])
def test_no_other_format_is_read(ours: Media, form: str) -> None:
    for data in (saved(form), b"RIFF\0\0\0\0WEBP" + saved(form)):
        refused(lambda data=data: ours.check(data, HERE), 400, "picture_broken")


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_cut_off_is_refused_here_or_when_it_is_decoded(ours: Media, form: str) -> None:
    data = saved(form)
    for end in range(0, len(data) - 30, 37):
        try:
            taken = ours.check(data[:end], HERE)
        except Refused as error:
            assert error.code == "picture_broken"
        else:
            with pytest.raises(ValueError):
                open_image(taken.image)


REAL = [saved(form) for form in FORMATS] + [saved("JPEG", progressive=True), saved("WEBP", lossless=True), png(40, 24)]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(REAL), st.data())
def test_damaged_pictures_are_taken_or_refused(real: bytes, draw: st.DataObject) -> None:
    ours = Media(Limits(picture_pixels=100_000))
    data = bytearray(real)
    for _ in range(draw.draw(st.integers(1, 6))):
        at = draw.draw(st.integers(0, min(len(data) - 1, 200) if draw.draw(st.booleans()) else len(data) - 1))
        data[at : at + draw.draw(st.integers(0, 4))] = draw.draw(st.binary(max_size=6))
        data = data or bytearray(b"x")
    try:
        taken = ours.check(bytes(data), HERE)
    except Refused as error:
        assert error.status == 400
        return
    assert taken.width * taken.height <= 100_000
    try:
        assert open_image(taken.image).size == (taken.width, taken.height)
    except ValueError:
        return


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([*headers._READERS, b"RIFF\0\0\0\0WEBPVP8X", b"RIFF\0\0\0\0WEBPVP8L", b""]), st.binary(max_size=300)
)
def test_bytes_of_chance_are_taken_or_refused(opening: bytes, rest: bytes) -> None:
    ours = Media(Limits(picture_pixels=100_000))
    try:
        taken = ours.check(opening + rest, HERE)
    except Refused as error:
        assert error.status == 400
    else:
        assert taken.width * taken.height <= 100_000


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.text("AZaz09+/=-_ \n", max_size=40))
def test_texts_of_chance_are_read_or_refused(text: str) -> None:
    try:
        found = Media(Limits()).decoded(text, HERE)
    except Refused as error:
        assert (error.status, error.code) == (400, "picture_base64")
    else:
        assert base64.b64encode(found).decode() == text
