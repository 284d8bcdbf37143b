"""Rows inside a big JSON file by their place, and companion files by key; nothing of the file's size is held.

Knows JSON and keys; what a row means the formats know.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vistune import files
from vistune.console import progress
from vistune.data.reading.json_rows import MAX_ROW, RowError, find_rows
from vistune.samples import FaultCode

T = TypeVar("T")

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+([{}\[\]])', re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)
_CLOSES = {b"}": b"{", b"]": b"["}
_BOM = b"\xef\xbb\xbf"


LARGEST = 1 << 62
"""No id and no size is above it; columns of 64 bits hold what is not."""


class BadRow(RowError):
    """What is wrong with one row, with the code of its fault; the reader of the row knows where it stands."""

    def __init__(self, reason: str, code: FaultCode = "row_unreadable"):
        self.reason, self.code = reason, code
        super().__init__(reason)


def want(row: Any, key: str, kind: type[T]) -> T:
    """`row[key]` of the type that it must have. Raises BadRow; numbers may be int where float is wanted."""
    if not isinstance(row, Mapping):
        raise BadRow(f"{json.dumps(row)[:60]} is no object")
    if key not in row:
        raise BadRow(f"{key} is missing; there are {', '.join(map(str, row)) or 'no keys'}")
    value = row[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else float("inf")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{key} is {value}, which is no number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise BadRow(f"{key} is a number of {value.bit_length()} bits")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadRow(f"{key} is {json.dumps(value, default=repr)[:60]}, expected {kind.__name__}")
    return value


def want_id(row: Any, key: str) -> str:
    """`row[key]`, a string or a whole number, as a string. Raises BadRow."""
    value = row.get(key) if isinstance(row, Mapping) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else want(row, key, str)


def find_members(path: str, place: Sequence[str]) -> np.ndarray:
    """int64 [n, 2]: bytes of every object or list that `place` leads to, in file order, found in one pass.

    `place` is a way down from the top: a key, or "*" for every element of a list and every member of an object (whose
    key is then part of its bytes). ("questions", "*") are the elements of the list under `questions`.

    Raises ValueError for a file that cannot be opened, is torn, or has nothing there.
    """
    with _bytes_of(path) as data:
        spans = np.frombuffer(_walk(data, place, path), np.int64).reshape(-1, 2)
    if not len(spans):
        way = "".join("[*]" if step == "*" else f".{step}" for step in place).lstrip(".")
        raise ValueError(f"{path}: there is nothing at {way}; is it the file of another data set?")
    return spans


@contextmanager
def _bytes_of(path: str) -> Iterator[Any]:
    """The file mapped, or all of a remote one."""
    try:
        if files.is_remote(path):
            yield files.read(path)
            return
        with open(path, "rb") as file:
            if not file.seek(0, 2):
                raise ValueError(f"{path}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be opened: {error.strerror or error}") from None


def _walk(data: Any, place: Sequence[str], path: str) -> array[int]:
    spans = array("q")
    opened: list[bytes] = []
    at = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    on_the_way = start = 0  # open containers that `place` leads through; where the target that is open now begins
    while opened or not on_the_way:
        found = _TO_BRACKET.match(data, at)
        if found is None:
            reason = "no JSON object or list" if not opened else f"torn: the file ends at byte {len(data)} inside it"
            raise ValueError(f"{path}: it is {reason}. Fetch the file again.")
        end, bracket, depth = found.end(), found[1], len(opened)
        if bracket in b"{[":
            if depth == on_the_way:
                key = _last_string(data, at, end) if depth and opened[-1] == b"{" else None
                if not depth or place[depth - 1] in ("*", _text(data, key)):
                    on_the_way += depth < len(place)
                    start = key[0] if key else end - 1
            opened.append(bracket)
        elif not opened or opened.pop() != _CLOSES[bracket]:
            raise ValueError(f"{path}: at byte {end - 1} '{bracket.decode()}' closes what is not open. Fetch it again.")
        elif depth - 1 == len(place) == on_the_way and start:
            spans.extend((start, end))
            start = 0
        elif depth == on_the_way:
            on_the_way -= 1
            if not on_the_way:
                break
        at = end
    return spans


def _last_string(data: Any, at: int, end: int) -> tuple[int, int] | None:
    last = None
    for found in _STRINGS.finditer(data, at, end):
        last = found.span()
    return last


def _text(data: Any, span: tuple[int, int] | None) -> str:
    """The key at `span`; for an element of a list what no key is matched with."""
    if span is None:
        return "*"
    text = bytes(data[span[0] : span[1]]).decode("utf-8", "replace")
    try:
        return str(json.loads(text))
    except ValueError:
        return text  # with its quotes: no key that is looked for


class Rows:
    """Objects of a JSON file by number, each read when it is asked for. Cheap to send to another process."""

    def __init__(
        self, path: str, place: Sequence[str], cache: Path | None, only: tuple[str, Sequence[Any]] | None = None
    ):
        """`place` as `find_members` takes it; () are the rows of a JSON list or of a file of JSON lines.

        `only` = (key, values) leaves out the rows whose key has another value.
        """
        self.path, self.place, self.only = path, tuple(place), only
        self.facts = facts_of(path)
        self._bytes = files.Opened(self.path)
        self._kept = cache / f"members-{digest(self.facts, self.place, only)}.npy" if cache else None
        self._spans = kept(self._kept, self._find)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> tuple[str, Any]:
        """(key, value) of a member of an object, ("", value) of an element of a list. Raises BadRow."""
        return self._read(*self._spans[number].tolist())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_spans": None if self._kept else self._spans}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._spans is None:
            self._spans = kept(self._kept, self._find)

    def _read(self, start: int, end: int) -> tuple[str, Any]:
        if end - start > MAX_ROW:
            raise BadRow(f"{end - start:,} bytes from byte {start}; a row may have {MAX_ROW:,}")
        try:
            text = self._bytes(start, end - start)
            member = text[:1] == b'"'
            value = json.loads((b"{" + text + b"}" if member else text).decode())
            if b"\\ud" in text or b"\\uD" in text:
                json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            reason = "not a JSON object" if start == end else f"not JSON (row begins at byte {start}): {error}"
            raise BadRow(reason) from None
        except OSError as error:
            raise BadRow(f"the file cannot be read: {type(error).__name__} {error}") from None
        key, value = value.popitem() if member else ("", value)
        return key, value

    def _find(self) -> np.ndarray:
        spans = find_members(self.path, self.place) if self.place else find_rows(self.path)
        if self.only is None:
            return spans
        key, values = self.only
        stays = [self._has(int(start), int(end), key, values) for start, end in spans]
        if not any(stays):
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{self.path}: none of its {len(spans):,} rows has {key} = {wanted}")
        return spans[np.array(stays)]

    def _has(self, start: int, end: int, key: str, values: Sequence[Any]) -> bool:
        try:
            row = self._read(start, end)[1]
        except BadRow:
            return True  # an unreadable row stays a row, so that it is reported
        return not isinstance(row, dict) or key not in row or row[key] in values


class Lookup:
    """Rows of a companion file by the value of one key."""

    def __init__(self, path: str, place: Sequence[str], key: str, cache: Path | None):
        self.rows, self.key = Rows(path, place, cache), key
        self._last: tuple[str, dict[str, Any]] | None = None  # neighbours often ask for the same row
        self._kept = cache / f"lookup-{digest(self.rows.facts, place, key)}.npy" if cache else None
        self._table = kept(self._kept, self._index)

    @property
    def facts(self) -> str:
        return self.rows.facts

    def get(self, value: Any) -> dict[str, Any]:
        """The row whose key has this value. Raises BadRow when there is none."""
        if self._last is None or self._last[0] != str(value):
            self._last = str(value), self._found(value)
        return self._last[1]

    def _found(self, value: Any) -> dict[str, Any]:
        wanted = hash64(str(value))
        at = int(np.searchsorted(self._table["hash"], np.uint64(wanted)))
        while at < len(self._table) and int(self._table["hash"][at]) == wanted:
            row = self.rows[int(self._table["row"][at])][1]
            if str(row.get(self.key)) == str(value):
                return row
            at += 1
        raise BadRow(f"{self.rows.path} has no row with {self.key} = {value!r}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None if self._kept else self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._table is None:
            self._table = kept(self._kept, self._index)

    def _index(self) -> np.ndarray:
        table = np.zeros(len(self.rows), [("hash", np.uint64), ("row", np.int64)])
        with progress() as bar:
            for row in bar.track(range(len(self.rows)), description=Path(self.rows.path).name):
                try:
                    table[row] = hash64(want_id(self.rows[row][1], self.key)), row
                except BadRow as error:
                    raise ValueError(f"{self.rows.path}: row {row}: {error.reason}") from None
        return np.sort(table, order=["hash", "row"])


def facts_of(path: str) -> str:
    """Changes when the file may have changed. Raises ValueError when it cannot be opened."""
    try:
        return files.facts(path)
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be opened: {error.strerror or error}") from None


def digest(*parts: Any) -> str:
    """16 letters that change with the parts."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:16]


def hash64(text: str) -> int:
    """64 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def kept(file: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives, made once and mapped from `file` afterwards; just made without a file."""
    if file is None:
        return make()
    if not file.exists():
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.npy")
        np.save(beside, made)
        os.replace(beside, file)
    return mapped(file)


def mapped(file: Path) -> np.ndarray:
    """The column in `file`, mapped. A plain array over the map: `memmap` itself costs microseconds at every access."""
    return np.load(file, mmap_mode="r").view(np.ndarray)
