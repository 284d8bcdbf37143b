"""Where the rows of a JSON list or a JSON lines file begin and end, in bytes, found in one pass over the mapped file.

It sees strings and brackets only: a row that is no valid JSON is still one row, as long as its brackets close.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# One match goes from any place outside a string over whole strings up to the next bracket. Possessive, so that a
# torn string fails at once instead of being tried again from every quote.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+([{}\[\]])', re.DOTALL)
_CLOSES = {b"}": b"{", b"]": b"["}
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 24


def find_rows(path: str | Path) -> np.ndarray:
    """int64 [rows, 2]: first byte and one past the last byte of every row, in file order.

    Raises ValueError (path, row, byte) for a file that is empty, has no rows, or is torn; OSError when it cannot be
    opened. The file is mapped, so what is held is 16 bytes a row.
    """
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise ValueError(f"{path}: the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = _first_byte(data)
            is_list = data[start : start + 1] == b"["
            spans = np.array(list(_list_rows(data, start, path)), np.int64) if is_list else _line_rows(data, start)
    if not len(spans):
        raise ValueError(f"{path}: no rows in it; expected a JSON list of objects, or one JSON object per line")
    return spans


def _first_byte(data: mmap.mmap) -> int:
    start = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    found = re.compile(rb"\S").search(data, start)
    return found.start() if found else len(data)


def _line_rows(data: mmap.mmap, start: int) -> np.ndarray:
    """Lines with anything but white space in them."""
    breaks = [
        np.flatnonzero(np.frombuffer(data[block : block + _BLOCK], np.uint8) == 10) + block
        for block in range(0, len(data), _BLOCK)
    ]
    ends = np.append(np.concatenate(breaks), len(data)).astype(np.int64)
    starts = np.append(0, ends[:-1] + 1)
    starts[0] = start
    spans = np.stack([starts, ends], axis=1)[ends > start]
    # Only short lines can be blank, and there are few of them: look at those alone.
    short = np.flatnonzero(spans[:, 1] - spans[:, 0] <= 16)
    blank = [i for i in short if not data[spans[i, 0] : spans[i, 1]].strip()]
    return np.delete(spans, blank, axis=0)


def _list_rows(data: mmap.mmap, start: int, path: str | Path) -> Iterator[tuple[int, int]]:
    """Spans of the list's elements. An element that is no object becomes an empty span: a row, an unreadable one."""
    open_brackets: list[bytes] = [b"["]
    at = gap = start + 1
    row, row_start = 0, start
    while open_brackets:
        found = _TO_BRACKET.match(data, at)
        if found is None:
            raise ValueError(
                f"{path}: row {row}, which begins at byte {row_start}, is torn: the file ends at byte {len(data)} "
                "inside it. Fetch the file again, or cut it before that row and close the list with ']'."
            )
        at, bracket = found.end(), found[1]
        if len(open_brackets) == 1:
            scalars = _scalars(data[gap : at - 1], row, gap, path)
            yield from [(gap, gap)] * scalars
            row, row_start = row + scalars, at - 1
        if bracket in b"{[":
            open_brackets.append(bracket)
            continue
        if open_brackets.pop() != _CLOSES[bracket]:
            raise ValueError(
                f"{path}: row {row}, which begins at byte {row_start}: at byte {at - 1} '{bracket.decode()}' closes "
                "what another kind of bracket opened. Mend that row; what follows cannot be told apart."
            )
        if len(open_brackets) == 1:
            yield row_start, at
            row, gap = row + 1, at
    if more := re.compile(rb"\S").search(data, at):
        raise ValueError(f"{path}: the list ends after row {row - 1}, yet there is more at byte {more.start()}")


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
