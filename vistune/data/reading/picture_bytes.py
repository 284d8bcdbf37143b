"""A picture's encoded bytes as they lie in its file, tar or row, their true suffix, and a folder to put them in.

Nothing is decoded and nothing encoded anew.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from vistune import files
from vistune.images import ImageError
from vistune.samples import Image

_STARTS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
_PER_FOLDER = 10_000


def read_picture(image: Image) -> bytes:
    """Its bytes. Raises ImageError when there are none."""
    if image.data is not None:
        data = image.data
    elif not image.path:
        raise ImageError("image_missing", "", "the row names no image")
    else:
        try:
            data = files.read(image.path, image.start, image.size)
        except FileNotFoundError:
            raise ImageError("image_missing", image.path, "no such file") from None
        except OSError as error:
            raise ImageError("image_broken", image.path, f"cannot be read: {error}") from None
    if not data or (image.size is not None and len(data) < image.size):
        raise ImageError("image_broken", image.path, f"{len(data)} bytes of it are there")
    return data


def true_suffix(data: bytes, name: str = "") -> str:
    """What the bytes are, as a suffix; where they do not tell, that of `name`."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    known = next((suffix for start, suffix in _STARTS.items() if data.startswith(start)), "")
    return known or PurePosixPath(name).suffix.lower()


def own_name(image: Image) -> str:
    """What the picture is called where it comes from, without folders; may be empty."""
    return PurePosixPath((image.name or image.path).replace("\\", "/")).name


class PictureFolder:
    """Puts pictures into a folder, 10,000 to a subfolder, numbered in the order they come."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0

    def put(self, data: bytes, name: str = "", stem: str = "") -> str:
        """Writes one; gives its path below the folder."""
        below = f"{self.count // _PER_FOLDER:05d}/{stem or f'{self.count:08d}'}{true_suffix(data, name)}"
        path = self.folder / below
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.count += 1
        return below
