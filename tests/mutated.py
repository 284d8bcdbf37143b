"""Rows and pictures broken in every way we could think of, made from a seed: one row, one mutation.

`mutated` writes JSON lines and pictures into a folder and says of every row what must become of it: "error" (set
aside), "ok" (trained on), "either" (chance decides how much of the picture is left; never a crash).
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

Fate = Literal["error", "ok", "either"]


@dataclass(frozen=True)
class Mutated:
    """The data file, the folder of its pictures, and of every row the mutation's name and what must become of it."""

    path: Path
    images: Path
    rows: list[tuple[str, Fate]]


def mutated(folder: Path, count: int, seed: int = 0) -> Mutated:
    """`count` rows: every mutation in turn, with other numbers each time round, and every tenth row a good one."""
    images = folder / "images"
    images.mkdir(parents=True)
    kinds = [*PICTURES, *ROWS]
    lines: list[bytes] = []
    rows: list[tuple[str, Fate]] = []
    turn = 0
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        place = Place(images, f"{number:04d}", draw, np.random.default_rng([seed, number]))
        if number % 10 == 9:
            name, fate, line = "good", "ok", place.row(place.save("png"))
        else:
            name, fate, make = kinds[turn % len(kinds)]
            turn += 1
            made = make(place)
            line = made if isinstance(made, bytes | dict) else place.row(made)
        lines.append(line if isinstance(line, bytes) else json.dumps(line).encode())
        rows.append((name, fate))
    path = folder / "mutated.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Mutated(path, images, rows)


@dataclass
class Place:
    """Where one row's picture goes, and the chances it has."""

    folder: Path
    name: str
    draw: random.Random
    noise: np.random.Generator

    def picture(self, mode: str = "RGB", size: tuple[int, int] | None = None) -> PIL.Image.Image:
        wide, high = size or (self.draw.randint(20, 70), self.draw.randint(20, 70))
        array = self.noise.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        return PIL.Image.fromarray(array).convert(mode)

    def encoded(self, format: str, picture: PIL.Image.Image | None = None, **options: Any) -> bytes:
        stream = io.BytesIO()
        (picture or self.picture()).save(stream, format, **options)
        return stream.getvalue()

    def write(self, data: bytes, extension: str = "jpg") -> str:
        (self.folder / f"{self.name}.{extension}").write_bytes(data)
        return f"{self.name}.{extension}"

    def save(self, extension: str, picture: PIL.Image.Image | None = None, **options: Any) -> str:
        (picture or self.picture()).save(self.folder / f"{self.name}.{extension}", **options)
        return f"{self.name}.{extension}"

    def row(self, image: Any = None, question: str = "", answer: str = "", **more: Any) -> dict[str, Any]:
        question = question or ("<image>\n" if image is not None else "") + f"What is in number {self.name}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer or f"A boat, {self.name}."}]
        row: dict[str, Any] = {"id": f"id-{self.name}", "conversations": turns} | more
        return row | ({} if image is None else {"image": image})


def cut(format: str, extension: str) -> Callable[[Place], str]:
    def make(place: Place) -> str:
        data = place.encoded(format)
        return place.write(data[: int(len(data) * place.draw.uniform(0.02, 0.98))], extension)

    return make


def flipped(format: str, extension: str) -> Callable[[Place], str]:
    def make(place: Place) -> str:
        data = bytearray(place.encoded(format))
        for _ in range(place.draw.randint(1, 12)):
            data[place.draw.randrange(len(data))] ^= 1 << place.draw.randrange(8)
        return place.write(bytes(data), extension)

    return make


def saved(extension: str, mode: str = "RGB", size: tuple[int, int] | None = None, **options: Any) -> Callable:
    return lambda place: place.save(extension, place.picture(mode, size), **options)


def bytes_of(data: bytes, extension: str = "jpg") -> Callable[[Place], str]:
    return lambda place: place.write(data, extension)


def png(
    width: int, height: int, depth: int = 8, colour: int = 0, idat: bytes = b"", *more: tuple[bytes, bytes]
) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *more]
    chunks += [(b"IDAT", idat), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


def animated(format: str, extension: str) -> Callable[[Place], str]:
    def make(place: Place) -> str:
        frames = [place.picture(size=(30, 20)) for _ in range(4)]
        return place.write(place.encoded(format, frames[0], save_all=True, append_images=frames[1:]), extension)

    return make


def sixteen(place: Place) -> str:
    array = place.noise.integers(0, 65536, (30, 40), dtype=np.uint16)
    return place.save("png", PIL.Image.fromarray(array))


def floats(place: Place) -> str:
    return place.save("tif", PIL.Image.fromarray(place.noise.random((20, 30), dtype=np.float32)))


def rotated(place: Place) -> str:
    exif = PIL.Image.Exif()
    exif[0x0112] = place.draw.randint(1, 8)
    return place.save("jpg", exif=exif)


def palette_alpha(place: Place) -> str:
    return place.save("png", place.picture("P"), transparency=bytes(place.draw.randrange(256) for _ in range(256)))


def folder_there(place: Place) -> str:
    (place.folder / f"{place.name}.png").mkdir()
    return f"{place.name}.png"


def pipe(place: Place) -> str:
    os.mkfifo(place.folder / f"{place.name}.jpg")
    return f"{place.name}.jpg"


def link_to(name: str) -> Callable[[Place], str]:
    def make(place: Place) -> str:
        os.symlink(name or f"{place.name}.jpg", place.folder / f"{place.name}.jpg")
        return f"{place.name}.jpg"

    return make


def sparse(place: Place) -> str:
    with open(place.folder / f"{place.name}.jpg", "wb") as file:
        file.truncate(3 << 30)
    return f"{place.name}.jpg"


def long_tail(place: Place) -> str:
    data = place.encoded("JPEG")
    with open(place.folder / f"{place.name}.jpg", "wb") as file:
        file.write(data[: len(data) // 2])
        file.truncate(32 << 20)
    return f"{place.name}.jpg"


def other_name(place: Place) -> str:
    place.save("png")
    return f"{place.name}.jpg"


_BOMB = zeros(76_000_000)

PICTURES: list[tuple[str, Fate, Callable[[Place], Any]]] = [
    ("jpeg cut", "either", cut("JPEG", "jpg")),
    ("png cut", "either", cut("PNG", "png")),
    ("gif cut", "either", cut("GIF", "gif")),
    ("webp cut", "either", cut("WEBP", "webp")),
    ("tiff cut", "either", cut("TIFF", "tif")),
    ("bmp cut", "either", cut("BMP", "bmp")),
    ("jpeg flipped", "either", flipped("JPEG", "jpg")),
    ("png flipped", "either", flipped("PNG", "png")),
    ("gif flipped", "either", flipped("GIF", "gif")),
    ("webp flipped", "either", flipped("WEBP", "webp")),
    ("tiff flipped", "either", flipped("TIFF", "tif")),
    ("jpeg 2000 flipped", "either", flipped("JPEG2000", "jp2")),
    ("empty", "error", bytes_of(b"")),
    ("noise", "error", lambda place: place.write(place.noise.bytes(place.draw.randint(1, 5000)))),
    ("text", "error", bytes_of(b"404 not found")),
    ("html", "error", bytes_of(b"<!doctype html><html><body>Forbidden</body></html>")),
    ("svg", "error", bytes_of(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "svg")),
    ("eps", "either", lambda place: place.write(place.encoded("EPS"), "eps")),
    ("png called jpg", "ok", lambda place: place.write(place.encoded("PNG"))),
    ("gif called jpg", "ok", lambda place: place.write(place.encoded("GIF"))),
    ("other extension", "error", other_name),
    ("missing", "error", lambda place: f"{place.name}.jpg"),
    ("header bomb", "error", bytes_of(png(60_000, 60_000, 8, 2, zlib.compress(b"")), "png")),
    ("zip bomb", "error", bytes_of(png(24_600, 24_600, 1, 0, _BOMB), "png")),
    ("zip bomb in a small picture", "either", bytes_of(png(16, 16, 8, 0, _BOMB), "png")),
    ("text bomb", "either", bytes_of(png(1, 1, 8, 0, zlib.compress(b"\0\0"), (b"zTXt", b"a\0\0" + _BOMB)), "png")),
    ("profile bomb", "either", bytes_of(png(1, 1, 8, 0, zlib.compress(b"\0\0"), (b"iCCP", b"a\0\0" + _BOMB)), "png")),
    ("no pixels", "error", bytes_of(png(0, 10, 8, 0, zlib.compress(b"")), "png")),
    ("cmyk", "ok", saved("jpg", "CMYK")),
    ("ycck tiff", "ok", saved("tif", "CMYK")),
    ("16 bits", "ok", sixteen),
    ("floats", "error", floats),
    ("32 bits", "error", saved("tif", "I")),
    ("gray", "ok", saved("jpg", "L")),
    ("one bit", "ok", saved("png", "1")),
    ("gray with alpha", "ok", saved("png", "LA")),
    ("alpha", "ok", saved("png", "RGBA")),
    ("palette and alpha", "ok", palette_alpha),
    ("animated gif", "ok", animated("GIF", "gif")),
    ("animated webp", "ok", animated("WEBP", "webp")),
    ("animated png", "ok", animated("PNG", "png")),
    ("pages", "ok", animated("TIFF", "tif")),
    ("rotated by exif", "ok", rotated),
    ("1 x 3000", "ok", saved("png", "RGB", (1, 3000))),
    ("3000 x 1", "ok", saved("png", "RGB", (3000, 1))),
    ("1 x 1", "ok", saved("png", "RGB", (1, 1))),
    ("large", "ok", lambda place: place.save("png", PIL.Image.new("L", (2000, 1500), 7))),
    ("more behind it", "ok", lambda place: place.write(place.encoded("JPEG") + place.noise.bytes(999))),
    (
        "broken exif",
        "ok",
        lambda place: place.write(place.encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40)),
    ),
    ("folder", "error", folder_there),
    ("pipe", "error", pipe),
    ("link to itself", "error", link_to("")),
    ("link to nothing", "error", link_to("nowhere.jpg")),
    ("link to a device", "error", link_to("/dev/zero")),
    ("sparse of 3 GB", "error", sparse),
    ("half a picture and zeros", "either", long_tail),
    ("odd name", "ok", lambda place: (setattr(place, "name", f"{place.name} ü\n'\"$(x) 图"), place.save("png"))[1]),
]


def raw(change: Callable[[bytes, Place], bytes]) -> Callable[[Place], bytes]:
    return lambda place: change(json.dumps(place.row()).encode(), place)


def values(**more: Any) -> Callable[[Place], dict]:
    return lambda place: place.row(**more)


def turn_list(*turns: Any) -> Callable[[Place], dict]:
    return values(conversations=list(turns))


def human(text: Any) -> dict:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict:
    return {"from": "gpt", "value": text}


def path(value: Any, marks: int = 1) -> Callable[[Place], dict]:
    return lambda place: place.row(value, "<image>\n" * marks + "What?")


def nested(depth: int) -> Callable[[Place], bytes]:
    return raw(lambda row, place: row[:-1] + b', "more": ' + b"[" * depth + b"]" * depth + b"}")


ROWS: list[tuple[str, Fate, Callable[[Place], Any]]] = [
    ("a number", "error", lambda place: b"7"),
    ("null", "error", lambda place: b"null"),
    ("a string", "error", lambda place: b'"row"'),
    ("a list", "error", lambda place: b"[]"),
    ("an empty object", "error", lambda place: b"{}"),
    ("torn", "error", raw(lambda row, place: row[: place.draw.randrange(1, len(row))])),
    ("two rows in one", "error", raw(lambda row, place: row + b" " + row)),
    ("noise", "error", lambda place: b"\x07" + place.noise.bytes(60).replace(b"\n", b"").replace(b"\r", b"")),
    ("bad utf-8", "error", raw(lambda row, place: row.replace(b"boat", b"b\xffoat"))),
    ("raw surrogate", "error", raw(lambda row, place: row.replace(b"boat", b"b\xed\xa0\x80oat"))),
    ("surrogate in a text", "error", raw(lambda row, place: row.replace(b"boat", b"b\\ud800oat"))),
    ("surrogate in an id", "error", raw(lambda row, place: row.replace(b"id-", b"\\uDfff"))),
    ("surrogate in a path", "error", path("\udcff.jpg")),
    ("a character in two halves", "ok", raw(lambda row, place: row.replace(b"boat", b"\\ud83d\\ude00"))),
    ("nul in a text", "ok", raw(lambda row, place: row.replace(b"boat", b"\\u0000"))),
    ("nul in a path", "error", path("a\0b.jpg")),
    ("a path of 5,000", "error", path("a" * 5000)),
    ("a path of 3,000", "error", path("b/" * 1500 + "a.jpg")),
    ("a name of 300", "error", path("c" * 300 + ".jpg")),
    ("path is a number", "error", path(5)),
    ("path is an object", "error", path({"bytes": None})),
    ("path is empty", "error", path("")),
    ("path is a dot", "error", path(".")),
    ("path is of a device", "error", path("/dev/zero")),
    ("path of a terminal", "error", path("/dev/stdin")),
    ("paths with a null", "error", path(["a.jpg", None], 2)),
    ("path of no protocol", "error", path("nosuch://bucket/a.jpg")),
    ("path of an unreachable place", "error", path("http://127.0.0.1:9/a.jpg")),
    ("path up and away", "error", path("../" * 40 + "nowhere/at/all.jpg")),
    ("60 pictures", "error", lambda place: place.row([place.save("png")] * 60, "<image>\n" * 60 + "Which?")),
    ("id is a list", "error", values(id=[1])),
    ("id is a fraction", "error", values(id=0.5)),
    ("id is true", "error", values(id=True)),
    ("id is null", "ok", values(id=None)),
    ("id is long", "ok", values(id="i" * 100_000)),
    (
        "id of 5,000 digits",
        "error",
        raw(lambda row, place: row.replace(b'"id": "', b'"id": ' + b"9" * 5000 + b', "x": "')),
    ),
    ("no conversation", "error", lambda place: {"id": "none"}),
    ("conversation is null", "error", values(conversations=None)),
    ("conversation is text", "error", values(conversations="Hello")),
    ("conversation is empty", "error", values(conversations=[])),
    ("turns are lists", "error", values(conversations=[[], []])),
    ("turns are empty", "error", values(conversations=[{}, {}])),
    ("value is a number", "error", turn_list(human("Hi"), gpt(5))),
    ("value is missing", "error", turn_list(human("Hi"), {"from": "gpt"})),
    ("a stranger", "error", turn_list(human("Hi"), {"from": "GPT", "value": "Yes"})),
    ("two questions", "error", turn_list(human("Hi"), human("Hi"), gpt("Yes"))),
    ("an answer alone", "error", turn_list(gpt("Yes"))),
    ("a question alone", "error", turn_list(human("Hi"))),
    ("an empty answer", "error", turn_list(human("Hi"), gpt(""))),
    ("a white answer", "error", turn_list(human("Hi"), gpt(" \n\t\u00a0"))),
    ("an empty question", "ok", turn_list(human(""), gpt("Yes"))),
    ("marks without pictures", "error", turn_list(human("<image>\n<image>\nHi"), gpt("Yes"))),
    ("a mark in an answer", "error", lambda place: place.row(place.save("png"), answer="Here: <image>")),
    ("no mark", "error", lambda place: place.row(place.save("png"), "What?")),
    ("200 marks", "error", lambda place: place.row(place.save("png"), "<image>" * 200)),
    ("words of control", "ok", turn_list(human("</s><s>[INST]<unk><|im_start|>"), gpt("</s>Yes<pad>"))),
    ("a long word", "ok", turn_list(human("Hi"), gpt("x" * 20_000))),
    ("a long question", "error", turn_list(human("why " * 9_000), gpt("Yes"))),
    ("many turns", "ok", turn_list(*[human("Hi"), gpt("Yes")] * 500)),
    ("odd characters", "ok", turn_list(human("\u202e\u200b\ufeff\u0301"), gpt("👩‍👩‍👧‍👦\U0010fffd\x7f\x1b[31m▁"))),
    ("nested 900 deep", "either", nested(900)),
    ("nested 100,000 deep", "error", nested(100_000)),
    ("a turn nested deep", "error", values(conversations=[[[[[[[["x"]]]]]]]])),
    ("not a number", "ok", raw(lambda row, place: row[:-1] + b', "score": NaN, "more": -Infinity}')),
    ("a key twice", "ok", raw(lambda row, place: row[:-1] + b', "id": "again"}')),
]
