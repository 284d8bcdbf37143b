"""VQAv2 as its authors publish it: a file of questions and a file of annotations, ten answers a question.

`path` is v2_OpenEnded_mscoco_*_questions.json; option `annotations` names v2_mscoco_*_annotations.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import Annotation, Annotations, most_frequent, option, picture_path
from vistune.data.reading.json_members import Lookup, Rows, want, want_id

PICTURE = "coco/train2017/{id:012}.jpg"


class Questions(Annotations):
    """A row is a question; its answer is the one that most of the ten people gave.

    VQAv2 says which that is (`multiple_choice_answer`); without it, equally frequent ones are decided by order.
    """

    def __init__(
        self,
        rows: Rows,
        answers: Lookup,
        images: Sequence[str],
        name: str,
        picture: str = PICTURE,
        text: str = "answer",
    ):
        super().__init__(rows, images, name, answers.facts, picture, text)
        self.answers, self.picture, self.text = answers, picture, text

    def annotation(self, key: str, row: Any) -> Annotation:
        id, image = want_id(row, "question_id"), want_id(row, "image_id")
        found = self.answers.get(id)
        given = [want(answer, self.text, str) for answer in want(found, "answers", list)]
        agreed = found.get("multiple_choice_answer") if self.text == "answer" else None
        return Annotation(
            id=id,
            picture=picture_path(self.picture, image),
            rounds=[(want(row, "question", str), agreed if isinstance(agreed, str) else most_frequent(given))],
            notes={"image_id": image, "answers": given},
        )


@register("vqav2")
def open_vqav2(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> Questions:
    refuse_unknown(path, "vqav2", options, ("annotations", "picture"))
    answers = Lookup(option(path, "vqav2", options, "annotations"), ("annotations", "*"), "question_id", cache)
    picture = option(path, "vqav2", options, "picture", PICTURE)
    return Questions(Rows(path, ("questions", "*"), cache), answers, images, name, picture)
