"""The rows of a JSON list or a JSON lines file, local or behind a URI: where each begins and ends, found in one pass,
and each read by its place.

The pass sees strings and brackets only: a row that is no valid JSON is still one row, as long as its brackets close.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistune import files

# One match goes from any place outside a string over whole strings up to the next bracket. Possessive, so that a
# torn string fails at once instead of being tried again from every quote.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+([{}\[\]])', re.DOTALL)
_CLOSES = {b"}": b"{", b"]": b"["}
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 24
_SHORT = 16  # bytes; only lines up to here are looked at for being blank

MAX_ROW = 1 << 26
"""Bytes of one row. Parsed it takes ten times as much, and a conversation is a thousand times smaller."""

MAX_STRING = 1 << 28
"""Bytes between two brackets of a file behind a URI. More is a string without an end, and must not fill the memory."""

_Window = bytes | mmap.mmap


class RowError(ValueError):
    """One row cannot be used: the message says why, and nothing of the file."""


class JsonRows:
    """Random access to the rows of one file. Cheap to send to another process, which opens the file itself.

    `cache`: a folder where the rows' places are kept, so that the file is gone through once. Raises ValueError when
    the file cannot be opened, is empty, has no rows, or is torn.
    """

    def __init__(self, path: str, cache: Path | None = None):
        self.path = path
        try:
            self.facts = files.facts(path)
        except OSError as error:
            reason = error.strerror or f"{type(error).__name__} {error}".strip()
            raise ValueError(f"{path}: the data file cannot be opened: {reason}") from None
        self._spans_file = cache / f"rows-{_digest(self.facts)}.npy" if cache else None
        self._spans = self._find()
        self._bytes = files.Opened(self.path)

    def __len__(self) -> int:
        return len(self._spans)

    def raw(self, row: int) -> bytes:
        """The row as it stands in the file; no bytes for what is no object."""
        start, end = (int(byte) for byte in self._spans[row])
        return self._bytes(start, end - start)

    def object(self, row: int) -> dict[str, Any]:
        """The object of `row`. Raises RowError for anything else there, and for a row that cannot be read."""
        start, end = (int(byte) for byte in self._spans[row])
        if end - start > MAX_ROW:
            raise RowError(f"{end - start:,} bytes from byte {start}; a row may have {MAX_ROW:,}")
        try:
            raw = self.raw(row)
            data = json.loads(raw.decode())  # from bytes, `json` would let halves of surrogate pairs pass
            if b"\\ud" in raw or b"\\uD" in raw:
                json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            reason = "not a JSON object" if start == end else f"not JSON (row begins at byte {start}): {error}"
            raise RowError(reason) from None
        except OSError as error:
            raise RowError(f"the file cannot be read: {type(error).__name__} {error}") from None
        if not isinstance(data, dict):
            raise RowError(f"{kind(data)}, expected an object")
        return data

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file itself, and maps the row places where they are on disk.
        return self.__dict__ | {"_spans": None if self._spans_file else self._spans}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._spans is None:
            self._spans = self._find()

    def _find(self) -> np.ndarray:
        if self._spans_file is None:
            return find_rows(self.path)
        if not self._spans_file.exists():
            spans = find_rows(self.path)
            self._spans_file.parent.mkdir(parents=True, exist_ok=True)
            beside = self._spans_file.with_suffix(f".{os.getpid()}.npy")
            np.save(beside, spans)
            os.replace(beside, self._spans_file)
        return np.load(self._spans_file, mmap_mode="r")


def kind(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") + (" that is empty" if value in ([], {}, "") else "")


def find_rows(path: str | Path) -> np.ndarray:
    """int64 [rows, 2]: first byte and one past the last byte of every row, in file order.

    Raises ValueError (path, row, byte) for a file that is empty, has no rows, or is torn; OSError when it cannot be
    opened. A local file is mapped, another is read in blocks, so what is held is 16 bytes a row and one block.
    """
    if files.is_remote(path):
        spans = _spans_of(_Stream(str(path)), path)
    else:
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                raise ValueError(f"{path}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                spans = _spans_of(_Mapped(data), path)
    if not len(spans):
        raise ValueError(f"{path}: no rows in it; expected a JSON list of objects, or one JSON object per line")
    return spans


class _Mapped:
    """A local file: one window on all of it."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.size = len(data)

    def windows(self) -> Iterator[tuple[int, _Window]]:
        yield 0, self.data

    def blocks(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        return ((at, self.data[at : at + _BLOCK]) for at in range(start, self.size, _BLOCK))


class _Stream:
    """A file behind a URI, a block at a time."""

    def __init__(self, path: str):
        self.path = path
        self.size = files.size(path)
        if not self.size:
            raise ValueError(f"{path}: the file is empty")

    def blocks(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        for at in range(start, self.size, _BLOCK):
            yield at, files.read(self.path, at, min(_BLOCK, self.size - at))

    windows = blocks


def _spans_of(source: _Mapped | _Stream, path: str | Path) -> np.ndarray:
    start, first = _first_byte(source)
    if first != b"[":
        return _line_rows(source, start)
    return np.array(list(_ListRows(source, start, path)), np.int64).reshape(-1, 2)


def _first_byte(source: _Mapped | _Stream) -> tuple[int, bytes]:
    """Where the text begins, after a byte order mark and white space, and with what."""
    for at, block in source.blocks():
        found = re.compile(rb"\S").search(block, len(_BOM) if not at and block.startswith(_BOM) else 0)
        if found:
            return at + found.start(), found[0]
    return source.size, b""


def _line_rows(source: _Mapped | _Stream, start: int) -> np.ndarray:
    """Lines with anything but white space in them."""
    parts, line, held = (
        [],
        0,
        b"",
    )  # `line`: where the line that is not over begins; `held`: its bytes while they are few
    for at, block in source.blocks():
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10).astype(np.int64) + at
        if at + len(block) == source.size:
            ends = np.append(ends, source.size)
        if not len(ends):
            held = held + block if len(held) + len(block) <= _SHORT else b"?" * (_SHORT + 1)
            continue
        spans = np.stack([np.append(line, ends[:-1] + 1), ends], axis=1)
        parts.append(_without_blank(spans, held + block, at - len(held)))
        line = int(ends[-1]) + 1
        held = block[line - at : line - at + _SHORT + 1]
    spans = np.concatenate(parts)
    spans = spans[spans[:, 1] > start]
    if len(spans):
        spans[0, 0] = max(start, spans[0, 0])
    return spans


def _without_blank(spans: np.ndarray, text: bytes, at: int) -> np.ndarray:
    """Only short lines can be blank, and there are few of them: those alone are looked at. `text` begins at `at`."""
    short = np.flatnonzero(spans[:, 1] - spans[:, 0] <= _SHORT)
    return np.delete(spans, [i for i in short if not text[spans[i, 0] - at : spans[i, 1] - at].strip()], axis=0)


class _ListRows:
    """Spans of a list's elements. An element that is no object becomes an empty span: a row, an unreadable one."""

    def __init__(self, source: _Mapped | _Stream, start: int, path: str | Path):
        self.source, self.path = source, path
        self.open_brackets = bytearray(b"[")  # one byte a level, so that no depth is too deep
        self.row, self.row_start, self.start = 0, start, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        parts: list[_Window] = []  # not done with yet
        held = enough = 0
        begin = self.start + 1  # all before is done
        for at, window in self.source.windows():
            stop = at + len(window)
            if stop <= begin:
                continue
            parts.append(window)
            held += len(window)
            if held < enough and stop < self.source.size:
                continue
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            base = stop - len(data)
            begin = base + (yield from self._window(data, base, max(begin - base, 0)))
            if not self.open_brackets:
                return self._refuse_more(begin)
            held = stop - begin
            if held > MAX_STRING and stop < self.source.size:
                raise self._torn(f"from byte {begin} on there is no bracket for {held:,} bytes")
            parts = [data[begin - base :]] if held and stop < self.source.size else []
            enough = 2 * held  # a long string is looked at again when there is twice as much of it
        raise self._torn(f"the file ends at byte {self.source.size} inside it")

    def _window(self, data: _Window, base: int, at: int) -> Any:
        """Yields the rows that end in `data`, which begins at byte `base` of the file; returns the place in it from
        which on it takes more to go on."""
        open_brackets, match = self.open_brackets, _TO_BRACKET.match
        gap = at
        while open_brackets:
            found = match(data, at)
            if found is None:
                return gap if len(open_brackets) == 1 else at
            at, bracket = found.end(), found[1]
            if len(open_brackets) == 1:
                scalars = _scalars(data[gap : at - 1], self.row, base + gap, self.path)
                yield from [(base + gap, base + gap)] * scalars
                self.row, self.row_start = self.row + scalars, base + at - 1
            if bracket in b"{[":
                open_brackets += bracket
                continue
            if open_brackets.pop() != _CLOSES[bracket][0]:
                raise ValueError(
                    f"{self.path}: row {self.row}, which begins at byte {self.row_start}: at byte {base + at - 1} "
                    f"'{bracket.decode()}' closes what another kind of bracket opened. Mend that row; what follows "
                    "cannot be told apart."
                )
            if len(open_brackets) == 1:
                yield self.row_start, base + at
                self.row, gap = self.row + 1, at
        return at

    def _torn(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path}: row {self.row}, which begins at byte {self.row_start}, is torn: {reason}. "
            "Fetch the file again, or cut it before that row and close the list with ']'."
        )

    def _refuse_more(self, end: int) -> None:
        for at, block in self.source.blocks(end):
            if more := re.compile(rb"\S").search(block):
                raise ValueError(
                    f"{self.path}: the list ends after row {self.row - 1}, yet more is at byte {at + more.start()}"
                )


def _scalars(between: bytes, row: int, byte: int, path: str | Path) -> int:
    """How many elements that are neither object nor list stand in the text between two rows."""
    text = between.strip().strip(b",").strip()
    if not text:
        return 0
    try:
        return len(json.loads(b"[" + text + b"]"))
    except ValueError:
        raise ValueError(
            f"{path}: before row {row}, at byte {byte}: {text[:60].decode(errors='replace')!r} is no JSON"
        ) from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
