"""What a folder of pictures holds, as JSON lines that are read by number: a line a picture, with the text beside it, or
a line for each row of a CSV file. Kept on disk when there is a place for it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from vistune import files
from vistune.console import progress
from vistune.data.reading.json_rows import MAX_ROW, JsonRows, RowError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXTS = (".txt", ".caption", ".json")
"""Endings of the text beside a picture; the first that is there counts."""


class Listing:
    """JSON objects by number. `lines` are gone through only when `cache` does not hold `key` yet."""

    def __init__(self, lines: Iterable[bytes], key: str, cache: Path | None):
        self._rows: JsonRows | None = None
        self._text, self._ends = b"", np.zeros(0, np.int64)
        if cache is None:
            self._hold(lines)
        else:
            self._keep(lines, cache / f"listing-{key}.jsonl", cache)

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    def object(self, row: int) -> dict[str, Any]:
        """Raises RowError for a line that is no text throughout."""
        if self._rows is not None:
            return self._rows.object(row)
        data = json.loads(self._text[self._ends[row - 1] if row else 0 : self._ends[row]])
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RowError(f"not UTF-8: {error}") from None
        return data

    def _hold(self, lines: Iterable[bytes]) -> None:
        buffer = io.BytesIO()
        self._ends = np.cumsum(np.fromiter((buffer.write(line) for line in lines), np.int64))
        self._text = buffer.getvalue()

    def _keep(self, lines: Iterable[bytes], place: Path, cache: Path) -> None:
        if not place.exists():
            cache.mkdir(parents=True, exist_ok=True)
            beside = place.with_suffix(f".{os.getpid()}.tmp")
            with open(beside, "wb") as file:
                file.writelines(lines)
            os.replace(beside, place)
        if place.stat().st_size:
            self._rows = JsonRows(str(place), cache)


def pairs(folder: str) -> tuple[list[bytes], str]:
    """A line `{"file_name", "text"}` a picture (text "": there is none), folder by folder in order of their names, and
    a digest that changes when a picture comes or goes or the text beside one changes."""
    seen = hashlib.sha256()
    lines: list[bytes] = []
    with progress() as bar:
        task = bar.add_task("pictures", total=None)
        for inner, names in _folders(folder):
            found = _paired(inner, names)
            for picture, text, facts in found:
                lines.append(_line({"file_name": picture, "text": text}))
                seen.update(lines[-1] + facts.encode())
            bar.update(task, advance=len(found))
    return lines, seen.hexdigest()


def csv_rows(path: str) -> Iterator[bytes]:
    """A line a row of a CSV file with a header. Raises ValueError for one that is no CSV; bytes that are no UTF-8 are
    their row's fault alone."""
    before = csv.field_size_limit(MAX_ROW)
    try:
        with io.TextIOWrapper(files.open_binary(path), "utf-8-sig", "surrogateescape", newline="") as text:
            for row in csv.DictReader(text):
                yield _line({key: value for key, value in row.items() if key is not None and isinstance(value, str)})
    except (csv.Error, OSError) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error}); look for a quote that is not closed") from None
    finally:
        csv.field_size_limit(before)


def _line(said: dict[str, str]) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _folders(folder: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every folder below, its place in `folder`, and its files with their facts (those of pictures are not asked)."""
    if files.is_remote(folder):
        yield from _remote_folders(folder)
        return
    for at, below, _ in os.walk(folder, onerror=_refuse):
        below[:] = sorted(name for name in below if not name.startswith("."))
        with os.scandir(at) as entries:
            there = {entry.name: entry for entry in entries if not entry.name.startswith(".") and entry.is_file()}
        inner = os.path.relpath(at, folder)
        yield "" if inner == "." else inner.replace(os.sep, "/"), {name: _facts(there[name]) for name in sorted(there)}


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: this folder of pictures cannot be listed: {error.strerror}")


def _facts(entry: os.DirEntry[str]) -> str:
    if entry.name.lower().endswith(PICTURES):
        return ""
    about = entry.stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _remote_folders(folder: str) -> Iterator[tuple[str, dict[str, str]]]:
    system, top = fsspec.core.url_to_fs(folder)
    about = system.find(top, detail=True)
    inner = {path[len(top) :].strip("/"): facts for path, facts in about.items()}
    order = sorted((path.rpartition("/")[::2] for path in inner), key=tuple)
    for at, members in itertools.groupby(order, key=lambda place: place[0]):
        names = [name for _, name in members]
        yield at, {name: _tag(inner[f"{at}/{name}" if at else name]) for name in names}


def _tag(about: dict[str, Any]) -> str:
    return " ".join(
        str(about[key]) for key in ("size", "ETag", "etag", "LastModified", "mtime", "created") if key in about
    )


def _paired(inner: str, names: dict[str, str]) -> list[tuple[str, str, str]]:
    """(picture, text, facts of the text) of one folder."""
    found = []
    for name in names:
        if name.lower().endswith(PICTURES):
            stem = os.path.splitext(name)[0]
            text = next((stem + ending for ending in TEXTS if stem + ending in names), "")
            paths = [f"{inner}/{part}" if inner and part else part for part in (name, text)]
            found.append((paths[0], paths[1], names.get(text, "")))
    return found
