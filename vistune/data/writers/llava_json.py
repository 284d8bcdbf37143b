"""Writes LLaVA's own format: a JSON list (`.json`) or an object a line (`.jsonl`), with its pictures beside.

A picture that is a file is named where it lies; one that is bytes, or a slice of a tar, is written into a folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from vistune.data.converting.staged import Staged
from vistune.data.reading.picture_bytes import PictureFolder, own_name, read_picture
from vistune.data.writers import register
from vistune.samples import Image, Sample

ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


class JsonRows:
    """Rows as JSON in one file, their pictures in the folder `NAME_images` beside it, made when there are any.

    `copy` takes pictures that are files into the folder too. `root`: pictures below it are named relative to it;
    others by their whole path.
    """

    def __init__(self, out: Path, copy: bool = False, root: str = "", notes: bool = True):
        self.out = out
        self.report: dict[str, Any] = {"samples": 0, "pictures_written": 0, "pictures_named": 0}
        self._images = Path(str(out)).with_name(f"{Path(str(out)).stem}_images")
        self._staged = Staged(self._images, out)
        self._copy, self._root, self._notes = copy, Path(root).absolute() if root else None, notes
        self._lines = str(out).endswith((".jsonl", ".ndjson"))
        self._pictures = PictureFolder(self._staged[self._images])
        self._file = open(self._staged[out], "w", encoding="utf-8")  # noqa: SIM115 - closed on leaving

    def row(self, sample: Sample, images: Sequence[str]) -> dict[str, Any]:
        """The row's own keys; the notes come after."""
        raise NotImplementedError

    def add(self, sample: Sample) -> None:
        written = [read_picture(image) if self._is_written(image) else None for image in sample.images]
        paths = [self._path(image, data) for image, data in zip(sample.images, written, strict=True)]
        row = self.row(sample, paths)
        kept = {key: value for key, value in sample.notes.items() if key not in row} if self._notes else {}
        before = "" if self._lines else ",\n" if self.report["samples"] else "[\n"
        self._file.write(before + json.dumps({**row, **kept}, ensure_ascii=False, default=str))
        self._file.write("\n" if self._lines else "")
        self.report["samples"] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None and not self._lines:
            self._file.write("\n]\n" if self.report["samples"] else "[]\n")
        self._file.close()
        if kind is None:
            self._staged.commit()
        else:
            self._staged.abandon()

    def _is_written(self, image: Image) -> bool:
        return image.data is not None or image.size is not None or self._copy

    def _path(self, image: Image, data: bytes | None) -> str:
        self.report["pictures_named" if data is None else "pictures_written"] += 1
        if data is not None:
            return f"{self._images.name}/{self._pictures.put(data, own_name(image))}"
        path = image.path if "://" in image.path else str(Path(image.path).absolute())
        if self._root and Path(path).is_relative_to(self._root):
            return str(Path(path).relative_to(self._root))
        return path


class LlavaJson(JsonRows):
    def row(self, sample: Sample, images: Sequence[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"id": sample.id}
        if images:
            row["image"] = images[0] if len(images) == 1 else list(images)
        turns = [{"from": ROLES[message.role], "value": message.text} for message in sample.messages]
        return {**row, "conversations": turns}


@register("llava_json")
def open_llava_json(out: Path, copy: bool = False, root: str = "", notes: bool = True) -> LlavaJson:
    return LlavaJson(out, copy, root, notes)
