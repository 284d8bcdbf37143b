"""Files and folders by path or by URI (`s3://`, `gs://`, `hf://`, ...): the same few questions for both.

Local files are asked without detours; everything else goes through fsspec. Knows nothing of what is in a file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URI that fsspec opens."""
    return "://" in str(path)


def join(folder: str | Path, path: str) -> str:
    """`path` below `folder`; an absolute path or a URI stays itself."""
    if is_remote(path):
        return path
    return f"{str(folder).rstrip('/')}/{path}" if is_remote(folder) else str(Path(folder) / path)


def exists(path: str | Path) -> bool:
    return _system(path).exists(str(path)) if is_remote(path) else os.path.exists(path)


def is_folder(path: str | Path) -> bool:
    return _system(path).isdir(str(path)) if is_remote(path) else os.path.isdir(path)


def size(path: str | Path) -> int:
    """Bytes. Raises OSError (FileNotFoundError) when it cannot be told."""
    return int(_system(path).size(str(path))) if is_remote(path) else os.stat(path).st_size


def facts(path: str | Path) -> str:
    """Changes when the file may have changed: place, size, and time or tag. Raises OSError."""
    if not is_remote(path):
        found = os.stat(path)
        return f"{Path(path).absolute()} {found.st_size} {found.st_mtime_ns}"
    about = _system(path).info(str(path))
    tags = [str(about[key]) for key in ("ETag", "etag", "LastModified", "mtime", "updated", "sha256") if key in about]
    return f"{path} {about['size']} {' '.join(tags)}"


def read(path: str | Path, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes from `start`, to the end without one. Raises OSError."""
    if is_remote(path):
        end = None if count is None else start + count
        return bytes(_system(path).cat_file(str(path), start=start, end=end))
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if count is None else count)


def open_binary(path: str | Path, start: int = 0, count: int | None = None) -> BinaryIO:
    """A seekable stream of the whole file, or of `count` bytes of it from `start`. Raises OSError."""
    if count is not None:
        return io.BytesIO(read(path, start, count))
    return cast(BinaryIO, fsspec.open(str(path), "rb").open()) if is_remote(path) else open(path, "rb")


def listed(folder: str | Path, *suffixes: str) -> Iterator[str]:
    """Files below `folder`, at any depth, whose names end with one of `suffixes` (any without), sorted by path."""
    if is_remote(folder):
        system = _system(folder)
        paths = [str(system.unstrip_protocol(path)) for path in system.find(str(folder))]
    else:
        paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    yield from sorted(path for path in paths if not suffixes or path.lower().endswith(suffixes))


class Opened:
    """A file that is read by place, again and again: opened at the first reading, by every process for itself, and
    closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.path = path
        self._file: int | None = None

    def __call__(self, start: int, count: int) -> bytes:
        """Raises OSError."""
        if is_remote(self.path):
            return read(self.path, start, count) if count else b""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        return os.pread(self._file, count, start)

    def __reduce__(self) -> tuple[Any, ...]:
        return Opened, (self.path,)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _system(path: str | Path) -> Any:
    return fsspec.core.url_to_fs(str(path))[0]
