"""The bytes of a PNG, JPEG, GIF or WebP before anything is decoded: how large it is, and what of it is pixels. Time and
memory are bounded whatever the bytes are.

Knows nothing of requests.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

SCANS = 100
"""Scans of a JPEG: each may change every pixel and take ten bytes. Encoders make about ten."""
SEGMENTS = 10_000
"""Of a JPEG: a profile has some, the film behind a moving photograph none."""
CHUNKS = 100_000
"""Of a PNG; the smallest that encoders make are some thousand bytes."""
BLOCKS = 2_000
"""Of a GIF before its first frame: its reader copies all comments for each that is added."""

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SLICE = 1 << 18
"""Bytes that are searched before other threads may go on."""

_PNG_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_JPEG_DROPPED = frozenset({0xFE, *range(0xE1, 0xF0)} - {0xEE})  # APP0 and APP14 say which colours the numbers are

Bytes = list[tuple[int, int]]  # from, to


@dataclass(frozen=True)
class Header:
    """`format` is Pillow's name; sides in pixels. `bare`: the file without what is no pixels: texts, profiles, further
    pictures. Readers inflate and copy those (a directory of 60 kB in a JPEG may name every byte a thousand times)."""

    format: str
    width: int
    height: int
    bare: bytes


def header(data: bytes) -> Header:
    """ValueError for what is none of the four, is cut off before its size is said, or costs more than it shows."""
    for opening, (name, read) in _READERS.items():
        if data.startswith(opening):
            try:
                width, height, kept = read(data)
            except (struct.error, IndexError) as error:
                raise ValueError(f"a {name} that is cut off") from error
            if not width or not height:
                raise ValueError(f"a {name} of {width} x {height} pixels")
            whole = kept == [(0, len(data))]
            return Header(name, width, height, data if whole else b"".join(data[start:end] for start, end in kept))
    raise ValueError("not a PNG, JPEG, WebP or GIF")


def _png(data: bytes) -> tuple[int, int, Bytes]:
    kind, width, height = struct.unpack_from(">4sII", data, 12)
    if kind != b"IHDR":
        raise ValueError("a PNG that does not begin with its size")
    at, kept = 8, [(0, 8)]
    for _ in range(CHUNKS):
        if at + 8 > len(data) or kind == b"IEND":
            return width, height, kept
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in _PNG_KEPT and (kind != b"IHDR" or at == 8):
            _keep(kept, at, at + length + 12)
        at += length + 12
    raise ValueError("a PNG of too many parts")


def _keep(kept: Bytes, start: int, end: int) -> None:
    """Neighbours become one."""
    if kept[-1][1] == start:
        start = kept.pop()[0]
    kept.append((start, end))


def _jpeg(data: bytes) -> tuple[int, int, Bytes]:
    """The size is the last that is said before the first scan: so its readers take it."""
    width, height, at, kept = 0, 0, 2, [(0, 2)]
    for _ in range(SEGMENTS):
        at = _marker(data, at)
        kind = data[at + 1]
        if kind == 0xDA:
            kept.append((at, _pixels_end(data, at)))
            return width, height, kept
        if kind == 0xD9:
            raise ValueError("a JPEG without pixels")
        length = 0 if kind in (0x01, 0xD8) else struct.unpack_from(">H", data, at + 2)[0]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
        if kind not in _JPEG_DROPPED:
            kept.append((at, at + 2 + length))
        at += 2 + length
    raise ValueError("a JPEG of too many segments")


def _pixels_end(data: bytes, at: int) -> int:
    """Where a JPEG ends whose first scan begins here."""
    scans = 0
    for _ in range(SEGMENTS):
        scans += data[at + 1] == 0xDA
        if scans > SCANS:
            raise ValueError(f"a JPEG of more than {SCANS} scans")
        if data[at + 1] == 0xD9:
            return at + 2
        at = _marker(data, at + 2 + struct.unpack_from(">H", data, at + 2)[0])
    raise ValueError("a JPEG of too many segments")


def _marker(data: bytes, at: int) -> int:
    """Where the next marker is. IndexError where there is none."""
    while at < len(data):
        if found := _MARKER.search(data, at, at + _SLICE + 1):
            return found.start()
        at += _SLICE
    raise IndexError(at)


def _gif(data: bytes) -> tuple[int, int, Bytes]:
    """The canvas, and as much more as the first frame needs: so its reader takes it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, inside = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), False
    for _ in range(BLOCKS):
        if inside:  # of an extension: the next of its blocks; an empty one is its last
            inside = bool(data[at])
            at += 1 + data[at]
        elif data[at] == 0x21:
            inside, at = True, at + 2
        elif data[at] == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + wide), max(height, top + high), [(0, len(data))]
        else:
            raise ValueError("a GIF without a picture")
    raise ValueError("a GIF of too many parts")


def _webp(data: bytes) -> tuple[int, int, Bytes]:
    kind, whole = data[12:16], [(0, len(data))]
    if data[8:12] != b"WEBP" or kind not in (b"VP8 ", b"VP8L", b"VP8X"):
        raise ValueError("not a PNG, JPEG, WebP or GIF")
    if kind == b"VP8X":
        low, wide, rest, high = struct.unpack_from("<HBHB", data, 24)
        return (low | wide << 16) + 1, (rest | high << 16) + 1, whole
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, whole
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF, whole


_READERS: dict[bytes, tuple[str, Callable[[bytes], tuple[int, int, Bytes]]]] = {
    b"\x89PNG\r\n\x1a\n": ("PNG", _png),
    b"\xff\xd8\xff": ("JPEG", _jpeg),
    b"GIF87a": ("GIF", _gif),
    b"GIF89a": ("GIF", _gif),
    b"RIFF": ("WEBP", _webp),
}
