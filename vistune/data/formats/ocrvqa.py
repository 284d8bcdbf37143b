"""OCR-VQA as its authors publish it: dataset.json, one JSON object of books by their id, each with its questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, choice, option, picture_path
from vistune.data.reading.json_members import BadRow, Rows, want

PICTURE = "ocr_vqa/images/{id}.jpg"
SPLITS = {"train": [1], "val": [2], "test": [3], "all": [1, 2, 3]}


class OcrVqa(Annotations):
    """A row is a book: all questions about its cover as one conversation, in the file's order."""

    def __init__(self, rows: Rows, images: Sequence[str], name: str, picture: str):
        super().__init__(rows, images, name, picture)
        self.picture = picture

    def annotation(self, key: str, row: Any) -> Annotation:
        questions, answers = want(row, "questions", list), want(row, "answers", list)
        if len(questions) != len(answers) or not questions:
            raise BadRow(f"it has {len(questions)} questions and {len(answers)} answers")
        if not all(isinstance(text, str) for text in [*questions, *answers]):
            raise BadRow("a question or an answer is no text")
        about = {name: row[name] for name in ("title", "authorName", "genre") if name in row}
        rounds = list(zip(questions, answers, strict=True))
        return Annotation(
            id=key, picture=picture_path(self.picture, key), rounds=rounds, notes={"image_id": key, **about}
        )


@register("ocrvqa")
def open_ocrvqa(path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]) -> OcrVqa:
    refuse_unknown(path, "ocrvqa", options, ("picture", "split"))
    split = choice(path, "ocrvqa", options, "split", tuple(SPLITS))
    rows = Rows(path, ("*",), cache, ("split", SPLITS[split]))
    return OcrVqa(rows, images, name, option(path, "ocrvqa", options, "picture", PICTURE))
