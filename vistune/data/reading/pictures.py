"""Where the pictures that rows name lie: paths against folders, local or behind a URI, and bytes written into the row.

Opens no picture; whether one can be decoded is found where it is decoded.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune import files
from vistune.samples import FaultCode, Image

LONGEST_PATH = 4096
"""Characters; what is longer is no path (Linux: PATH_MAX)."""

_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+\Z")


class PictureError(ValueError):
    """A row's entry that names no picture, with the code of its fault."""

    def __init__(self, code: FaultCode, reason: str):
        self.code = code
        self.reason = reason
        super().__init__(reason)


class Folders:
    """Folders that relative picture paths are looked for in, in order. Raises ValueError for one that is not there.

    `source` is the data file or folder; without any folder, paths are relative to `beside`.
    """

    def __init__(self, source: str, folders: Sequence[str], beside: str):
        self.all = list(folders) or [beside]
        for folder in folders:
            if not files.is_folder(folder):
                raise ValueError(f"{source}: its image folder {folder} does not exist")
        self._first = "" if files.is_remote(self.all[0]) else self.all[0]

    def resolve(self, path: str) -> str:
        """`path` in the first folder that has it; one that is nowhere keeps the first folder. An absolute path or a
        URI stays itself."""
        # Most are local, and there is a row for each: no detours.
        local = self._first and "://" not in path
        first = os.path.join(self._first, path) if local else files.join(self.all[0], path)
        if len(self.all) == 1 or files.exists(first):
            return first
        tried = (files.join(folder, path) for folder in self.all[1:])
        return next((file for file in tried if files.exists(file)), first)

    def fingerprint(self) -> str:
        return str([folder if files.is_remote(folder) else os.path.abspath(folder) for folder in self.all])


def beside(path: str | Path) -> str:
    """The folder that a file lies in."""
    return str(path).rpartition("/")[0] if files.is_remote(path) else str(Path(path).parent)


def picture(value: Any, folders: Folders) -> Image:
    """The picture that `value` stands for: bytes, `{bytes, path}` as `datasets` writes it, `{url}`, a path, a URI, a
    `data:` URI, or base64. Raises PictureError."""
    if isinstance(value, Mapping):
        return _of_mapping(value, folders)
    if value is None:
        _refuse("image_missing", "a picture is null")
    if isinstance(value, bytes):
        return Image(data=value) if value else _refuse("image_broken", "a picture of 0 bytes")
    if not isinstance(value, str):
        _refuse("row_unreadable", f"a picture is {str(value)[:60]!r}, expected bytes, a path, or {{bytes, path}}")
    if value.startswith("data:"):
        head, comma, text = value.partition(",")
        return (
            _decoded(text)
            if comma and head.endswith(";base64")
            else _refuse("image_broken", "a data: URI of no base64")
        )
    if len(value) > LONGEST_PATH:
        return _decoded(value)
    if not value or "\0" in value:
        _refuse("row_unreadable", f"a picture's path is {value[:60]!r}")
    return Image(path=folders.resolve(value))


def _of_mapping(value: Mapping[str, Any], folders: Folders) -> Image:
    path = next((value[key] for key in ("path", "url", "file_name") if isinstance(value.get(key), str)), "")
    if data := value.get("bytes"):
        if not isinstance(data, bytes):
            return (
                _decoded(data) if isinstance(data, str) else _refuse("row_unreadable", "a picture's bytes are a number")
            )
        return Image(data=data, name=path)
    if not path:
        _refuse("image_missing", "a picture has neither bytes nor a path")
    return picture(path, folders)


def _decoded(text: str) -> Image:
    try:
        if not _BASE64.match(text):
            raise binascii.Error("characters that are not in its alphabet")
        data = base64.b64decode(text.replace("-", "+").replace("_", "/"))
    except binascii.Error as error:
        _refuse("image_broken", f"base64 that cannot be decoded: {error}")
    return Image(data=data) if data else _refuse("image_broken", "a picture of 0 bytes")


def _refuse(code: FaultCode, reason: str) -> Any:
    raise PictureError(code, reason)
