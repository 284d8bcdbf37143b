"""Tar files by place: where members and samples begin, from `.tar.idx` or by reading headers; and writing shards.

Knows names, bytes and the rule that groups members into samples, nothing of what is in a member.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vistune import files

BLOCK = 512
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # as WebDataset and energon cut a name
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_LONGEST_NAME = 1 << 20  # bytes of an extended header; more is no name
_PLAIN, _EMPTY = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
_BEFORE = (b"L", b"x", b"K", b"g")  # headers that speak of the member after them
_OPEN = 8  # files kept open by one reader

Read = Callable[[int, int], bytes]
"""(first byte, count) -> those bytes, fewer at the end of the file."""


class TarError(ValueError):
    """A tar that cannot be read on from some byte; says which tar, which byte, and what to do."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file in a tar: `header` is its first header's byte (extended ones too), `start` its content's."""

    name: str
    header: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The byte after its content and padding."""
        return self.start + _padded(self.size)


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.c.jpg` -> ("a/b", "c.jpg"): the sample's key and the part; None for what belongs to no sample."""
    found = None if _SKIPPED.match(name) else _KEY.match(name)
    return (found[1], found[2]) if found else None


def members(path: str, read: Read, start: int, stop: int) -> Iterator[Member]:
    """The regular files whose headers lie in [start, stop), which begins at a header. Contents are not read.

    GNU and pax long names are followed. Raises TarError where a header or a content is not whole.
    """
    at, long_name, size_told = start, None, None
    first = start
    while at < stop:
        head = read(at, BLOCK)
        if len(head) < BLOCK:
            raise _torn(path, at, "the file ends inside a header")
        if head[0] == 0 and not head.strip(b"\0"):
            return
        size = _number(path, head, at)
        size = size if size_told is None else size_told
        kind = head[156:157]
        if at + BLOCK + size > stop and kind not in _EMPTY:
            raise _torn(path, at, f"a member of {size} bytes reaches beyond byte {stop}")
        if kind in _PLAIN:
            yield Member(long_name if long_name is not None else _name(head), first, at + BLOCK, size)
        elif kind in (b"L", b"x"):
            if size > _LONGEST_NAME:
                raise _torn(path, at, f"a name of {size} bytes")
            text = read(at + BLOCK, size)
            if kind == b"L":
                long_name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                told, size_told = _pax(path, text, at)
                long_name = told if told is not None else long_name
        elif kind in (b"S", b"M"):
            raise TarError(f"{path}: byte {at}: a sparse or split member; write the tar anew without it")
        # Links, devices and folders have no content, whatever size they tell.
        at += BLOCK if kind in _EMPTY else BLOCK + _padded(size)
        if kind not in _BEFORE:
            first, long_name, size_told = at, None, None


def scan(path: str, size: int) -> np.ndarray:
    """uint64 [samples + 1]: where each sample's first header lies, and where the last one ends; headers alone are read.

    What `.tar.idx` holds. Raises TarError for a torn tar, OSError.
    """
    starts: list[int] = []
    last, end = None, 0
    with files.open_binary(path) as file:  # from afar it reads ahead, which asking for each header would not

        def read(start: int, count: int) -> bytes:
            file.seek(start)
            return file.read(count)

        for member in members(path, read, 0, size):
            end = member.end
            named = split_name(member.name)
            if named is not None and named[0] != last:
                starts.append(member.header)
                last = named[0]
    return np.array([*starts, end], np.uint64)


def read_index(path: str, size: int) -> np.ndarray | None:
    """What `path`.idx says of the tar `path` of `size` bytes, as `scan` gives it; None when there is no such file.

    Raises TarError when index and tar do not belong together.
    """
    try:
        raw = files.read(path + ".idx")
    except FileNotFoundError:
        return None
    mend = f"Fetch both again; if the tar is whole, delete {path}.idx: it is found again by scanning"
    if len(raw) < 8 or len(raw) % 8:
        raise TarError(f"{path}.idx: {len(raw)} bytes are no list of 64-bit offsets. {mend}")
    offsets = np.frombuffer(raw, "<u8")
    if (offsets[1:] <= offsets[:-1]).any():
        raise TarError(f"{path}.idx: its offsets do not grow. {mend}")
    if offsets[-1] > size:
        raise TarError(
            f"{path}: torn: its .idx says that samples end at byte {offsets[-1]}, the tar has {size}. {mend}"
        )
    return offsets


class Files:
    """Pieces of files; a few local ones are kept open. Safe across fork and pickling: another process opens its own."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._process = os.getpid()

    def read(self, path: str, start: int, count: int) -> bytes:
        """Up to `count` bytes of `path` from `start`. Raises OSError."""
        if files.is_remote(path):
            return files.read(path, start, count)
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        file = self._open.get(path)
        if file is not None:
            self._open.move_to_end(path)
        else:
            file = self._open[path] = files.open_binary(path)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        return os.pread(file.fileno(), count, start)

    def of(self, path: str) -> Read:
        return lambda start, count: self.read(path, start, count)

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, ()

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()


class ShardWriter:
    """Writes one tar and its `.idx`: equal members give equal bytes, since no time and no owner is written."""

    def __init__(self, path: Path):
        self.path = path
        self.samples = 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self._starts: list[int] = []

    @property
    def size(self) -> int:
        return self._file.tell()

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """One sample: a member `key.part` for each of `parts`, in order."""
        assert split_name(f"{key}.x") == (key, "x"), f"{key!r} is no sample key"
        self._starts.append(self.size)
        for part, data in parts.items():
            self._file.write(_header(f"{key}.{part}", len(data)))
            self._file.write(data)
            self._file.write(bytes(_padded(len(data)) - len(data)))
        self.samples += 1

    def close(self) -> None:
        """Ends the tar with two empty blocks, and writes the index beside it."""
        end = self.size
        self._file.write(bytes(2 * BLOCK))
        self._file.close()
        Path(f"{self.path}.idx").write_bytes(np.array([*self._starts, end], "<u8").tobytes())

    def abandon(self) -> None:
        self._file.close()


def _header(name: str, size: int) -> bytes:
    about = tarfile.TarInfo(name)
    about.size, about.mode = size, 0o444
    return about.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(path: str, head: bytes, at: int) -> int:
    """The size that a header tells, once its checksum is seen to be right."""
    field = head[148:156]
    try:
        told = int(field.strip(b" \0"), 8)
        size = head[124:136]
        number = int.from_bytes(size[1:], "big") if size[0] == 0x80 else int(size.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _torn(path, at, "no tar header there") from None
    # A checksum is the sum of all bytes, with spaces for its own field. Adler's low half is 1 + such a sum modulo
    # 65521, and is twenty times as fast as adding in Python.
    if zlib.adler32(head) & 0xFFFF != (1 + told - 8 * ord(" ") + sum(field)) % 65521:
        raise _torn(path, at, "the header's checksum is wrong")
    return number


def _name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    prefix = head[345:500].split(b"\0", 1)[0] if head[345] and head[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(path: str, text: bytes, at: int) -> tuple[str | None, int | None]:
    """Name and size that a pax header tells of the member after it, where it does."""
    name, size, place = None, None, 0
    while place < len(text) and text[place]:
        digits = text[place : place + 20].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        record = text[place : place + length]
        if not record.endswith(b"\n"):
            raise _torn(path, at, "an extended header that is not whole")
        key, _, value = record[len(digits) + 1 : -1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value) if value.isdigit() else None
        place += length
    return name, size


def _torn(path: str, at: int, why: str) -> TarError:
    return TarError(
        f"{path}: torn at byte {at}: {why}. Fetch the shard again; or keep what is whole with "
        f"`head -c {at} {path} > mended.tar`, delete its .idx and name the new one in split.yaml"
    )
