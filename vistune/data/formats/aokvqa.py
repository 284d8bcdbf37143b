"""A-OKVQA as its authors publish it: a JSON list of questions with their options, such as aokvqa_v1p0_train.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, option, picture_path
from vistune.data.reading.json_members import BadRow, Rows, want, want_id

PICTURE = "coco/train2017/{id:012}.jpg"


class Aokvqa(Annotations):
    """A row is a question, its answer the right option's text. Notes: `choices`, and in `answer` the right one's number
    (from 0), which the transforms for multiple choice take."""

    def __init__(self, rows: Rows, images: Sequence[str], name: str, picture: str):
        super().__init__(rows, images, name, picture)
        self.picture = picture

    def annotation(self, key: str, row: Any) -> Annotation:
        image = want_id(row, "image_id")
        choices, right = want(row, "choices", list), want(row, "correct_choice_idx", int)
        if not all(isinstance(text, str) for text in choices) or not 0 <= right < len(choices):
            raise BadRow(f"correct_choice_idx is {right}, choices are {choices!r:.80}")
        return Annotation(
            id=want_id(row, "question_id"),
            picture=picture_path(self.picture, image),
            rounds=[(want(row, "question", str), choices[right])],
            notes={"image_id": image, "choices": choices, "answer": right},
        )


@register("aokvqa")
def open_aokvqa(path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]) -> Aokvqa:
    refuse_unknown(path, "aokvqa", options, ("picture",))
    return Aokvqa(Rows(path, ("*",), cache), images, name, option(path, "aokvqa", options, "picture", PICTURE))
