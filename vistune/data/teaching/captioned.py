"""What is known of pictures in words: captions and boxes, from JSON lines or from COCO's annotation files.

Knows nothing of who is asked about them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune import files

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture: captions, and named boxes [left, top, right, bottom] as shares of its width and height."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...] = ()

    def context(self) -> str:
        """As a teacher is told of it: a caption a line, an empty line, a box a line."""
        boxes = [f"{name}: [{', '.join(f'{edge:.3f}' for edge in box)}]" for name, box in self.boxes]
        return "\n".join(self.captions) + ("\n\n" + "\n".join(boxes) if boxes else "")


def pictures(rows: str | Path, boxes: str | Path | None = None, folder: str = "") -> Iterator[Picture]:
    """Pictures of a file, in its order. `folder` is put before their paths.

    JSON lines: `{"image", "captions": [..], "boxes": [{"category", "bbox": [x, y, w, h] in pixels}], "width",
    "height"}`; a box may instead say `"box"`, which is [left, top, right, bottom] in shares; `id` may be given. Else
    COCO's captions file, and in `boxes` its instances file. Raises ValueError with file and row.
    """
    text = files.read(rows).decode("utf-8-sig", errors="strict")
    if _is_coco(text):
        yield from _coco(str(rows), text, boxes, folder)
        return
    if boxes is not None:
        raise ValueError(f"{rows}: boxes of another file go with COCO's captions; JSON lines have them in each row")
    for number, line in enumerate(text.splitlines()):
        if line.strip():
            yield _row(f"{rows}:{number}", line, folder)


def _is_coco(text: str) -> bool:
    first = text[: text.find("\n")] if "\n" in text else text
    try:
        row = json.loads(first)
    except ValueError:
        row = None  # one object over many lines, or a torn line: then the row's reader says so
    if isinstance(row, dict):
        return "annotations" in row
    return text.lstrip()[:1] == "{" and '"annotations"' in text


def _row(where: str, line: str, folder: str) -> Picture:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
        raise ValueError(f'{where}: expected an object with "image" and "captions": {line[:80]}')
    captions = row.get("captions")
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError(f"{where}: captions is {json.dumps(captions)[:80]}, expected a list of sentences")
    listed = row.get("boxes") or []
    return Picture(
        id=str(row.get("id") or Path(row["image"]).stem),
        image=files.join(folder, row["image"]) if folder else row["image"],
        captions=tuple(" ".join(caption.split()) for caption in captions),
        boxes=tuple(_box(where, box, row.get("width"), row.get("height")) for box in listed),
    )


def _box(where: str, box: Any, width: Any, height: Any) -> tuple[str, Box]:
    try:
        name = str(box["category"])
        if "box" in box:
            left, top, right, bottom = (float(edge) for edge in box["box"])
        else:
            x, y, w, h = (float(edge) for edge in box["bbox"])
            left, top, right, bottom = x / width, y / height, (x + w) / width, (y + h) / height
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        said = json.dumps(box)[:80]
        raise ValueError(
            f"{where}: box {said}: expected category and bbox [x, y, width, height] in pixels, with the row's width "
            "and height; or category and box [left, top, right, bottom] in shares"
        ) from None
    clipped = (_share(left), _share(top), _share(right), _share(bottom))
    if not (-0.01 <= left <= right <= 1.01 and -0.01 <= top <= bottom <= 1.01):
        raise ValueError(f"{where}: box {json.dumps(box)[:80]} lies outside the picture of {width} x {height}")
    return name, clipped


def _share(edge: float) -> float:
    return min(1.0, max(0.0, edge))


def _coco(path: str, text: str, boxes: str | Path | None, folder: str) -> Iterator[Picture]:
    captions: dict[Any, list[str]] = defaultdict(list)
    for entry in _objects(path, text, "annotations"):
        if "caption" not in entry:
            raise ValueError(f"{path}: annotation {entry.get('id')} has no caption; give COCO's captions file here")
        captions[entry["image_id"]].append(" ".join(entry["caption"].split()))
    found = _coco_boxes(boxes) if boxes is not None else {}
    for image in _objects(path, text, "images"):
        if image["id"] not in captions:
            continue
        where = f"{path}: image {image['id']}"
        named = [
            _box(where, {"category": name, "bbox": box}, image["width"], image["height"])
            for name, box in found.get(image["id"], [])
        ]
        name = image["file_name"]
        yield Picture(
            id=Path(name).stem,
            image=files.join(folder, name) if folder else name,
            captions=tuple(captions[image["id"]]),
            boxes=tuple(named),
        )


def _coco_boxes(path: str | Path) -> dict[Any, list[tuple[str, list[float]]]]:
    """Name and pixel box of every single thing, by picture; outlines are not kept, crowds are left out."""
    text = files.read(path).decode()
    names = {entry["id"]: entry["name"] for entry in _objects(str(path), text, "categories")}
    found: dict[Any, list[tuple[str, list[float]]]] = defaultdict(list)
    for entry in _objects(str(path), text, "annotations"):
        if not entry.get("iscrowd"):
            found[entry["image_id"]].append((names[entry["category_id"]], entry["bbox"]))
    return found


def _objects(path: str, text: str, key: str) -> Iterator[dict[str, Any]]:
    """Entries of the list `key` of a JSON object, one at a time: with the outlines of COCO's things the whole
    of it would take many gigabytes."""
    begin = re.search(rf'(?<!\\)"{key}"\s*:\s*\[', text)
    if not begin:
        raise ValueError(f"{path}: it has no list {key!r}; expected one of COCO's annotation files")
    decoder, at = json.JSONDecoder(), begin.end()
    space = re.compile(r"[\s,]*")
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        try:
            entry, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise ValueError(f"{path}: {key}: torn near character {at}: {error}") from None
        yield entry
