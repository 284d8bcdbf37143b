"""Visual Genome's region descriptions as its authors publish them: region_descriptions.json.

Option `image_data` names image_data.json, which has the pictures' sizes and folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, option
from vistune.data.reading.json_members import BadRow, Lookup, Rows, want, want_id


class Regions(Annotations):
    """A row is a region with its phrase as the answer; its question is empty. Notes: `phrase`, `box` (x1, y1, x2, y2 in
    pixels), `width` and `height` of the picture."""

    def __init__(self, rows: Rows, pictures: Lookup, images: Sequence[str], name: str, folder: str):
        super().__init__(rows, images, name, pictures.facts, folder)
        self.pictures, self.folder = pictures, folder

    def annotation(self, key: str, row: Any) -> Annotation:
        image, phrase = want_id(row, "image_id"), want(row, "phrase", str)
        x, y, width, height = (want(row, name, float) for name in ("x", "y", "width", "height"))
        about = self.pictures.get(image)
        place = want(about, "url", str).split("/")[-2:]  # https://.../VG_100K_2/1.jpg
        if len(place) != 2 or not place[0].startswith("VG_"):
            raise BadRow(f"picture {image} has the address {about['url']!r}, which names no folder VG_100K")
        return Annotation(
            id=want_id(row, "region_id"),
            picture="/".join([*filter(None, [self.folder]), *place]),
            rounds=[("", phrase)],
            notes={
                "image_id": image,
                "phrase": phrase,
                "box": (x, y, x + width, y + height),
                "width": want(about, "width", int),
                "height": want(about, "height", int),
            },
        )

    def id_of(self, key: str, row: Any) -> str:
        return str(row.get("region_id", "")) if isinstance(row, dict) else ""


@register("visual_genome")
def open_visual_genome(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> Regions:
    refuse_unknown(path, "visual_genome", options, ("image_data", "folder"))
    pictures = Lookup(option(path, "visual_genome", options, "image_data"), ("*",), "image_id", cache)
    folder = option(path, "visual_genome", options, "folder", "vg")
    return Regions(Rows(path, ("*", "regions", "*"), cache), pictures, images, name, folder.strip("/."))
