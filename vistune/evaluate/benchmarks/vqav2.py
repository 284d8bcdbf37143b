"""VQAv2: questions about COCO pictures, ten answers each. Asks, scores val, writes what EvalAI takes of test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistune.evaluate import official, people, scoring
from vistune.evaluate.benchmarks import SHORT, Benchmark
from vistune.evaluate.items import Answer, Id, Question, Result
from vistune.evaluate.official import Place, field
from vistune.evaluate.people import Asked

ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
VAL = "v2_OpenEnded_mscoco_val2014_questions.json"
TEST_DEV = ("llava_vqav2_mscoco_test-dev2015.jsonl", "v2_OpenEnded_mscoco_test-dev2015_questions.json")
TEST = ("llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json")
UPLOAD = "vqav2_upload.json"


class Vqav2(Benchmark):
    """VQAv2: val, whose answers are published, or test, whose answers EvalAI has.

    Files of val, in the folder or below it; with the annotations there, val is asked and scored:
        v2_mscoco_val2014_annotations.json          {annotations: [{question_id, answers: [{answer}, ...], ...}, ...]}
        v2_OpenEnded_mscoco_val2014_questions.json  {questions: [{question_id, image_id, question}, ...]}
        val2014/COCO_val2014_000000262148.jpg
    Files of test, as LLaVA's scores are made (either may be VQA's own file instead):
        llava_vqav2_mscoco_test-dev2015.jsonl       {question_id, image, text, category}: what is asked
        llava_vqav2_mscoco_test2015.jsonl           the same rows and more: for all of them the upload has an answer
        test2015/COCO_test2015_000000262144.jpg
    Where both lie there, the ids of the answers say which of the two is scored.
    Prompt: the question and `SHORT`.
    Score: answers are normalised (`scoring.normalise`), then VQA's rule (`scoring.vqav2`) in percent, averaged over the
    questions; by type of answer and of question. Upload: [{question_id, answer}, ...] with "" where there is no answer.
    """

    name = "vqav2"
    title = "VQAv2"
    also = ("vqa", "vqa_v2", "vqav2_val", "vqav2_test")
    folders = ("vqav2",)
    published = 107_394
    server = "EvalAI, challenge 830"

    def questions(self, place: Place) -> list[Question]:
        if place.find(ANNOTATIONS):
            return [one.question for one in _val(place, place.file(VAL))]
        return _test(place)

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        if _of_val(place, answers):
            return people.scored(_val(place, place.find(VAL)), answers, scoring.vqav2)
        every = place.find(*TEST)
        ids = [str(row["question_id"]) for row in _rows(every)] if every else []
        return people.unscored(_test(place), answers, ids)

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """vqav2_upload.json: a row for every question of test, in its file's order, "" where none was given. Of val
        nothing is handed in."""
        if _of_val(place, answers):
            return []
        given = {str(one.id): one.text for one in answers}
        rows = [
            {"question_id": id, "answer": scoring.normalise(given.get(str(id), ""))}
            for id in (row["question_id"] for row in _rows(place.file(*TEST)))
        ]
        return [official.write(out / UPLOAD, json.dumps(rows))]


def _of_val(place: Place, answers: Sequence[Answer]) -> bool:
    return people.are_open(place, answers, ANNOTATIONS, (*TEST, *TEST_DEV), _rows)


def _val(place: Place, path: Path | None) -> list[Asked]:
    """Questions with annotations, in the order of the questions' file; of the annotations where there is none, for
    scoring does without their text."""
    source = place.file(ANNOTATIONS)
    known = {str(_id(row, source)): row for row in _members(source, "annotations")}
    if path is None:
        return [_asked(place, row, "", source) for row in known.values()]
    asked = []
    for row in _members(path, "questions"):
        if (annotation := known.get(str(_id(row, path)))) is None:
            raise ValueError(f"{source}: no annotation of question {row['question_id']} of {path}; fetch both again")
        asked.append(_asked(place, annotation, field(row, "question", path, str(row["question_id"])) + SHORT, source))
    return asked


def _asked(place: Place, row: dict[str, Any], text: str, source: Path) -> Asked:
    id, said = row["question_id"], people.said(row, source, row["question_id"])
    picture = place.picture(f"COCO_val2014_{field(row, 'image_id', source, id):012}.jpg", "val2014", "images/val2014")
    kind = str(row.get("answer_type", ""))
    truth = str(row.get("multiple_choice_answer", people.agreed(said)))
    return Asked(
        question=Question(id=id, text=text, images=(picture,), category=kind, truth=truth),
        people=said,
        groups={"answer type": kind, "question type": str(row.get("question_type", ""))},
    )


def _test(place: Place) -> list[Question]:
    rows = _rows(place.file(*TEST_DEV, *TEST))
    return [people.hidden(place, row, "test2015", "images/test2015") for row in rows]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a question file of test as LLaVA writes them, made of VQA's own file if it is that."""
    if path.suffix == ".jsonl":
        return official.question_rows(path, "image")
    return [
        {
            "question_id": (id := _id(row, path)),
            "image": f"COCO_test2015_{field(row, 'image_id', path, str(id)):012}.jpg",
            "text": field(row, "question", path, str(id)) + SHORT,
        }
        for row in _members(path, "questions")
    ]


def _members(path: Path, key: str) -> list[dict[str, Any]]:
    return official.members(path, key, "visualqa.org")


def _id(row: dict[str, Any], path: Path) -> Id:
    found: Id = field(row, "question_id", path, "a row")
    return found
