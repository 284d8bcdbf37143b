"""TextCaps as its authors publish it: captions in TextCaps_0.1_*.json, and what an OCR system read in the pictures.

Option `ocr` names TextVQA_Rosetta_OCR_*.json; without it no sample knows what is written in its picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, option, picture_path
from vistune.data.reading.json_members import BadRow, Lookup, Rows, want, want_id

PICTURE = "textvqa/train_images/{id}.jpg"


class TextCaps(Annotations):
    """A row is a caption, five a picture; its question is empty. Notes: `ocr_tokens`, `width`, `height`."""

    def __init__(self, rows: Rows, ocr: Lookup | None, images: Sequence[str], name: str, picture: str):
        super().__init__(rows, images, name, ocr.facts if ocr else "", picture)
        self.ocr, self.picture = ocr, picture

    def annotation(self, key: str, row: Any) -> Annotation:
        image = want_id(row, "image_id")
        notes: dict[str, Any] = {"image_id": image}
        if "image_width" in row and "image_height" in row:
            notes |= {"width": want(row, "image_width", int), "height": want(row, "image_height", int)}
        if self.ocr:
            notes["ocr_tokens"] = _tokens(self.ocr.get(image))
        return Annotation(
            id=want_id(row, "caption_id") if "caption_id" in row else image,
            picture=picture_path(self.picture, image),
            rounds=[("", want(row, "caption_str", str))],
            notes=notes,
        )

    def id_of(self, key: str, row: Any) -> str:
        return str(row.get("image_id", "")) if isinstance(row, dict) else ""


def _tokens(row: dict[str, Any]) -> list[str]:
    """What OCR read, in its order: `ocr_tokens`, or the words of `ocr_info` where the file has only those."""
    if "ocr_tokens" not in row:
        return [want(found, "word", str) for found in want(row, "ocr_info", list)]
    tokens = want(row, "ocr_tokens", list)
    if not all(isinstance(token, str) for token in tokens):
        raise BadRow(f"ocr_tokens of picture {row.get('image_id')} are no texts")
    return tokens


@register("textcaps")
def open_textcaps(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> TextCaps:
    refuse_unknown(path, "textcaps", options, ("ocr", "picture"))
    ocr = (
        Lookup(option(path, "textcaps", options, "ocr"), ("data", "*"), "image_id", cache) if "ocr" in options else None
    )
    picture = option(path, "textcaps", options, "picture", PICTURE)
    return TextCaps(Rows(path, ("data", "*"), cache), ocr, images, name, picture)
