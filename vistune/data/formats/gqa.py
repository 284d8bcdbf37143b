"""GQA as its authors publish it: one JSON object of questions by their id, such as train_balanced_questions.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, choice, option, picture_path
from vistune.data.reading.json_members import Rows, want, want_id

PICTURE = "gqa/images/{id}.jpg"


class Gqa(Annotations):
    """A row is a question. Its answer is a word or two (`answer`) or a sentence (`fullAnswer`)."""

    def __init__(self, rows: Rows, images: Sequence[str], name: str, picture: str, text: str):
        super().__init__(rows, images, name, picture, text)
        self.picture, self.text = picture, text

    def annotation(self, key: str, row: Any) -> Annotation:
        image = want_id(row, "imageId")
        return Annotation(
            id=key,
            picture=picture_path(self.picture, image),
            rounds=[(want(row, "question", str), want(row, self.text, str))],
            notes={"image_id": image},
        )


@register("gqa")
def open_gqa(path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]) -> Gqa:
    refuse_unknown(path, "gqa", options, ("picture", "text"))
    picture = option(path, "gqa", options, "picture", PICTURE)
    text = choice(path, "gqa", options, "text", ("answer", "fullAnswer"))
    return Gqa(Rows(path, ("*",), cache), images, name, picture, text)
