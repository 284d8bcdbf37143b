"""What is wrong with one picture: where its file is, what its header says, whether all of it decodes.

Knows nothing of rows.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from vistune import files
from vistune.images import MAX_PIXELS, ImageError, Layout, image_header, open_image
from vistune.samples import Image

MAX_ASPECT = 200
"""Longer or wider than this a picture is a line: resized to any usual side, less than two pixels of it are left."""

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),  # JPEG with a second picture behind it, as cameras write
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
}
"""What Pillow calls a format -> the extensions of its files."""

TRIED = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG", ".GIF", ".WEBP")
"""Extensions under which a missing file is looked for, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Where a picture is. `code` (of `findings.WHAT`) is empty when it is where it should be; `image` is None when it
    is nowhere."""

    image: Image | None
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a look into a picture found: (code, message) pairs, and what its header says when it has one."""

    found: tuple[tuple[str, str], ...] = ()
    format: str = ""
    width: int = 0
    height: int = 0


def folders_of(reader: Any) -> tuple[str, ...]:
    """The folders in which the reader looks for pictures; none for a reader that does not look."""
    return tuple(getattr(getattr(reader, "folders", None), "all", ()))


def locate(image: Image, folders: tuple[str, ...] = ()) -> Located:
    """Whether the picture is there, under its own name or another extension, there or in another of `folders`.

    What is in no folder stands in the first, as its reader says. Opens nothing.
    """
    located = _locate(image)
    inside = f"{folders[0].rstrip('/')}/" if folders else ""
    if located.code == "image_missing" and inside and image.path.startswith(inside):
        for folder in folders[1:]:
            other = _locate(replace(image, path=files.join(folder, image.path.removeprefix(inside))))
            if other.code == "image_extension":
                return other
    return located


def _locate(image: Image) -> Located:
    if image.data is not None:
        return Located(image=image) if image.data else _broken("no bytes")
    if not image.path:
        return Located(image=None, code="image_missing", message="the row names no picture")
    if image.size is not None:  # inside a container, whose format has found it there
        return Located(image=image)
    return _located_far(image) if files.is_remote(image.path) else _located_here(image)


def key(image: Image) -> int:
    """64 bits that are the same for the same picture: of its place, or of its bytes when it lies in the row."""
    what = image.data
    if what is None:
        what = f"{image.path}\0{image.start}\0{image.size}\0{image.name}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), "little")


def judge(image: Image, *, decode: bool, layout: Layout | None = None) -> Verdict:
    """Look into a picture that is there: its header, and with `decode` all its pixels, as training would see them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of what is said here with its row
        return _judged(image, decode, layout)


def _judged(image: Image, decode: bool, layout: Layout | None) -> Verdict:
    try:
        format, width, height = image_header(image)
    except ImageError as error:
        return Verdict(found=((_code(error), error.reason),))
    found: list[tuple[str, str]] = []
    if (said := _format_said(image)) and format in FORMATS and said not in FORMATS[format]:
        found.append(("image_format", f"the name says {said}, the content is {format}"))
    if max(width, height) > MAX_ASPECT * min(width, height):
        found.append(("image_aspect", f"{width} x {height} pixels"))
    if decode:
        try:
            picture = open_image(image)
            if layout is not None:
                layout.prepare(picture)
        except ImageError as error:
            found.append((_code(error), error.reason))
        except MemoryError:
            found.append(("image_broken", f"{width} x {height} pixels do not fit into this machine's memory"))
    return Verdict(found=tuple(found), format=format, width=width, height=height)


def _code(error: ImageError) -> str:
    if error.code == "image_missing":
        return "image_missing"
    if f"{MAX_PIXELS:,}" in error.reason:
        return "image_bomb"
    return "image_truncated" if "truncated" in error.reason.lower() else "image_broken"


def _format_said(image: Image) -> str:
    """The extension of the picture's name, if it is one of a picture."""
    extension = PurePosixPath(image.name or image.path).suffix.lower()
    return extension if any(extension in known for known in FORMATS.values()) else ""


def _broken(message: str) -> Located:
    return Located(image=None, code="image_broken", message=message)


def _located_here(image: Image) -> Located:
    try:
        facts = os.stat(image.path)
    except (FileNotFoundError, NotADirectoryError):
        return _elsewhere(image, [other for other in _others(image.path) if os.path.isfile(other)])
    except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a NUL in it
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or "cannot be read"
        return Located(image=None, code="image_missing", message=reason)
    if stat.S_ISDIR(facts.st_mode):
        return _broken("a folder, no file")
    if not stat.S_ISREG(facts.st_mode):
        return _broken("a pipe, a socket or a device, no file")
    return Located(image=image) if facts.st_size else _broken("the file is empty")


def _located_far(image: Image) -> Located:
    try:
        if files.exists(image.path):
            return Located(image=image)
        return _elsewhere(image, [other for other in _others(image.path) if files.exists(other)])
    except (OSError, ValueError, ImportError) as error:
        return Located(image=None, code="image_missing", message=f"cannot be asked for: {error}")


def _others(path: str) -> list[str]:
    stem, _ = os.path.splitext(path)
    return [stem + extension for extension in TRIED if stem + extension != path]


def _elsewhere(image: Image, others: list[str]) -> Located:
    if not others:
        return Located(image=None, code="image_missing", message="no such file")
    message = f"no such file, but {PurePosixPath(others[0]).name} is there"
    return Located(image=replace(image, path=others[0]), code="image_extension", message=message)
