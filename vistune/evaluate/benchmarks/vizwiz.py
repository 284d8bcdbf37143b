"""VizWiz: questions that blind people asked about their photos. Asks, scores val, writes what EvalAI takes of test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistune.evaluate import official, people, scoring
from vistune.evaluate.benchmarks import SHORT, Benchmark
from vistune.evaluate.items import Answer, Question, Result
from vistune.evaluate.official import Place, field
from vistune.evaluate.people import Asked

VAL = "val.json"
TEST = ("llava_test.jsonl", "test.json")
UPLOAD = "vizwiz_upload.json"

UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""What LLaVA-1.5 adds before `SHORT` (arXiv 2310.03744, table of response formats)."""

NAMED = 20
"""Of the questions without an answer, how many are named."""


class VizWiz(Benchmark):
    """VizWiz: val, whose answers are published, or test, whose answers EvalAI has.

    Files of val, in the folder or below it; with them there, val is asked and scored:
        val.json           [{image, question, answers: [{answer, answer_confidence}, ...], answer_type}, ...]
        val/VizWiz_val_00000000.jpg
    Files of test, as LLaVA's scores are made:
        llava_test.jsonl   {question_id, image, text, category}; or test.json, [{image, question}, ...]
        test/VizWiz_test_00000000.jpg
    Where both lie there, the ids of the answers say which of the two is scored. VizWiz's own files have no ids: a
    question is known by its picture's name.
    Prompt: the question, `UNSURE` and `SHORT`.
    Score: answers are normalised (`scoring.normalise`), then VizWiz's rule (`scoring.vizwiz`) in percent, averaged over
    the questions; by type of answer. Upload: [{image, answer}, ...]; EvalAI refuses one that lacks a question.
    """

    name = "vizwiz"
    title = "VizWiz"
    also = ("vizwiz_vqa", "vizwiz_val", "vizwiz_test")
    folders = ("vizwiz",)
    published = 4_319
    server = "EvalAI, challenge 2185"

    def questions(self, place: Place) -> list[Question]:
        if place.find(VAL):
            return [one.question for one in _val(place)]
        return _test(place)

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        if _of_val(place, answers):
            return people.scored(_val(place), answers, scoring.vizwiz)
        return people.unscored(_test(place), answers)

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """vizwiz_upload.json: a row for every question of test, in its file's order. Of val nothing is handed in.

        ValueError that names the questions without an answer.
        """
        if _of_val(place, answers):
            return []
        given, rows = {str(one.id): one.text for one in answers}, _rows(place.file(*TEST))
        if missing := [str(row["question_id"]) for row in rows if str(row["question_id"]) not in given]:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise ValueError(
                f"{UPLOAD}: not written, {len(missing)} of {len(rows)} questions have no answer and EvalAI takes only"
                f" all of them: question_id {', '.join(missing[:NAMED])}{more}"
            )
        upload = [{"image": row["image"], "answer": scoring.normalise(given[str(row["question_id"])])} for row in rows]
        return [official.write(out / UPLOAD, json.dumps(upload))]


def _of_val(place: Place, answers: Sequence[Answer]) -> bool:
    return people.are_open(place, answers, VAL, TEST, _rows)


def _val(place: Place) -> list[Asked]:
    path = place.file(VAL)
    return [
        _asked(place, row, number, path) for number, row in enumerate(official.members(path, None, "vizwiz.org"), 1)
    ]


def _asked(place: Place, row: dict[str, Any], number: int, path: Path) -> Asked:
    image, said = field(row, "image", path, number), people.said(row, path, number)
    kind = str(row.get("answer_type", ""))
    text = field(row, "question", path, number) + UNSURE + SHORT
    picture = place.picture(image, "val", "images")
    return Asked(
        question=Question(id=image, text=text, images=(picture,), category=kind, truth=people.agreed(said)),
        people=said,
        groups={"answer type": kind},
    )


def _test(place: Place) -> list[Question]:
    return [people.hidden(place, row, "test", "images") for row in _rows(place.file(*TEST))]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the question file of test as LLaVA writes them, made of VizWiz's own file if it is that."""
    if path.suffix == ".jsonl":
        return official.question_rows(path, "image")
    return [
        {"question_id": image, "image": image, "text": field(row, "question", path, number) + UNSURE + SHORT}
        for number, row in enumerate(official.members(path, None, "vizwiz.org"), 1)
        for image in (field(row, "image", path, number),)
    ]
