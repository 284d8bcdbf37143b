"""A folder of pictures with their texts: beside each (`x.jpg`, `x.txt` or `x.json`), or all in one metadata file.

What is listed is kept as one line a row, so that a folder of millions is gone through once and never held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vistune import files
from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.columns import ColumnError, conversation, find_columns, notes
from vistune.data.reading.json_rows import MAX_ROW, JsonRows, RowError
from vistune.data.reading.listings import PICTURES, TEXTS, Listing, csv_rows, pairs
from vistune.samples import IMAGE_MARK, Fault, FaultCode, Image, Sample, SampleError

METADATA = ("metadata.jsonl", "metadata.csv")
_NAMES = ("file_name", "image", "path")  # of the column that names the picture
_CAPTIONS = ("caption", "text")


class ImageText:
    """Samples `(picture, text)` of `folder`, in the order of the pictures' paths, or of the metadata file's rows.

    A text is a caption, which answers `prompt`, or with `.json` and metadata also a conversation. A picture without a
    text is a faulty row. What the folder holds is taken when it is opened. Raises ValueError for one without pictures.
    """

    def __init__(self, folder: str, name: str, prompt: str, cache: Path | None, keep: bool = False):
        if not files.is_folder(folder):
            raise ValueError(f"{folder}: no such folder of pictures")
        self.name = name
        self.folder = folder.rstrip("/")
        self._prompt = prompt
        metadata = next((at for file in METADATA if files.exists(at := files.join(folder, file))), "")
        self._beside = not metadata
        self._rows: JsonRows | Listing
        if metadata.endswith(".jsonl"):
            self._rows = JsonRows(metadata, cache)
            self._facts = self._rows.facts
        elif metadata:
            self._facts = files.facts(metadata)
            self._rows = Listing(csv_rows(metadata), _digest(self._facts), cache)
        else:
            self._rows, self._facts = _listed(self.folder, cache, keep)
        if not len(self._rows):
            expected = f"rows in {metadata}" if metadata else f"files that end with {', '.join(PICTURES)}"
            raise ValueError(f"{folder}: no pictures in it; expected {expected}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        id = ""
        try:
            said = self._rows.object(row)
            picture = next((said[key] for key in _NAMES if isinstance(said.get(key), str) and said[key]), "")
            if not picture or "\0" in picture:
                raise ColumnError("row_unreadable", f"none of {', '.join(_NAMES)} names a picture")
            id = str(said.get("id") or os.path.splitext(picture)[0])
            if self._beside:
                said = self._text(said)
            return self._sample(row, id, picture, said)
        except RowError as error:
            raise self._fault(row, id, "row_unreadable", str(error)) from None
        except ColumnError as error:
            raise self._fault(row, id, error.code, error.reason) from None

    def fingerprint(self) -> str:
        return _digest(f"{self._facts} {self.name} {self.folder} {self._prompt}")

    def _sample(self, row: int, id: str, picture: str, said: Mapping[str, Any]) -> Sample:
        values = {key: value for key, value in said.items() if key not in ("id", "images", *_NAMES)}
        caption = next((key for key in _CAPTIONS if values.get(key) is not None), "")
        columns = find_columns(list(values), {"caption": caption} if caption else {})
        placed = replace(columns, images="image")
        messages, _, _ = conversation({**values, "image": picture}, placed, self._prompt)
        images = (Image(path=files.join(self.folder, picture)),)
        said = notes(values, columns)
        return Sample(id=id, source=self.name, row=row, messages=tuple(messages), images=images, notes=said)

    def _text(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What the file beside the picture says: plain text as a caption."""
        if not said["text"]:
            raise ColumnError("row_unreadable", f"{said['file_name']} has no text beside it ({', '.join(TEXTS)})")
        path = files.join(self.folder, said["text"])
        try:
            raw = files.read(path, 0, MAX_ROW + 1)
            if len(raw) > MAX_ROW:
                raise ColumnError("row_unreadable", f"{path} has more than {MAX_ROW:,} bytes")
            text = raw.decode("utf-8-sig")
            value = json.loads(text) if path.endswith(".json") else {"caption": text.strip()}
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, ColumnError):
                raise
            raise ColumnError("row_unreadable", f"{path}: {type(error).__name__} {error}") from None
        if isinstance(value, list):
            value = {"messages": value}
        if not isinstance(value, dict):
            raise ColumnError("row_unreadable", f"{path} is neither an object nor a list of turns")
        return value

    def _fault(self, row: int, id: str, code: FaultCode, reason: str) -> SampleError:
        return SampleError(Fault(source=self.name, row=row, id=id, code=code, reason=reason))


@register("image_text")
def open_image_text(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> ImageText:
    """Options: `prompt`, what a caption answers to (`<image>` alone), and `keep_listing` = true: what the folder held
    when it was first listed is believed from then on, and not looked at again."""
    refuse_unknown(path, "image_text", options, ("prompt", "keep_listing"))
    prompt, keep = options.get("prompt", IMAGE_MARK), options.get("keep_listing", False)
    if not isinstance(prompt, str) or not isinstance(keep, bool):
        raise ValueError(f"{path}: options.prompt = {prompt!r} is text, options.keep_listing = {keep!r} true or false")
    if images:
        raise ValueError(f"{path}: images = {list(images)}: the pictures of image_text lie in its own folder")
    return ImageText(path, name, prompt, cache, keep)


def _listed(folder: str, cache: Path | None, keep: bool) -> tuple[Listing, str]:
    """The pictures of `folder`, and what changes when it does."""
    place = folder if files.is_remote(folder) else os.path.abspath(folder)
    remembered = cache / f"folder-{_digest(place)}.json" if cache and keep else None
    if cache and remembered and remembered.exists():
        facts = json.loads(remembered.read_text())["facts"]
        if (cache / f"listing-{facts[:16]}.jsonl").exists():
            return Listing((), facts[:16], cache), facts
    lines, facts = pairs(folder)
    listing = Listing(lines, facts[:16], cache)
    if remembered:
        beside = remembered.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps({"folder": folder, "facts": facts}) + "\n")
        os.replace(beside, remembered)
    return listing, facts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
