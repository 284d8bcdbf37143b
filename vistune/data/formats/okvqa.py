"""OK-VQA as its authors publish it: VQA's two files, with every answer as written and in its basic form.

`path` is OpenEnded_mscoco_*_questions.json; option `annotations` names mscoco_*_annotations.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.formats.vqav2 import PICTURE, Questions
from vistune.data.reading.annotations import choice, option
from vistune.data.reading.json_members import Lookup, Rows


@register("okvqa")
def open_okvqa(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> Questions:
    refuse_unknown(path, "okvqa", options, ("annotations", "picture", "text"))
    answers = Lookup(option(path, "okvqa", options, "annotations"), ("annotations", "*"), "question_id", cache)
    picture = option(path, "okvqa", options, "picture", PICTURE)
    text = choice(path, "okvqa", options, "text", ("answer", "raw_answer"))
    return Questions(Rows(path, ("questions", "*"), cache), answers, images, name, picture, text)
