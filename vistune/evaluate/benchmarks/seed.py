"""SEED-Bench: multiple choice about pictures and videos, a video as its middle frame. Asks and scores as LLaVA does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune import console
from vistune.evaluate import official
from vistune.evaluate.benchmarks import LETTER, Benchmark
from vistune.evaluate.items import Answer, Question, Result, accuracies, item, of_answered, percent
from vistune.evaluate.official import Place, field
from vistune.samples import Image

OFFICIAL = "SEED-Bench.json"
LLAVA = "llava-seed-bench.jsonl"
UPLOAD = "seed_bench.jsonl"
IMAGES, FRAMES = "SEED-Bench-image", "SEED-Bench-video-image"
KINDS = ("image", "video")


class SeedBench(Benchmark):
    """SEED-Bench, the first version.

    Files, in the folder or below it:
        SEED-Bench.json          {"questions": [{question_id, question, choice_a..d, answer, data_id, data_type,
                                 question_type_id}, ...], "question_type": {name: id}}
        llava-seed-bench.jsonl   {question_id, image, text, category}; built from the questions where it is absent
        SEED-Bench-image/1454426_2591111986
        SEED-Bench-video-image/10_v0.png     TYPE_ID.png: the middle frame of a video, or of its segment
    Prompt: the question, "A. " to "D. " with the choices, each on a line, and `LETTER`.
    Score: the answer is the letter and nothing else, or wrong; no answer is wrong. Accuracy over all questions, over
    pictures, over videos and for each type. Two of the 19,242 published questions have one id; they share its answer.
    """

    name = "seed"
    title = "SEED-Bench"
    also = ("seed_bench", "seedbench", "seed_bench_v1")
    folders = ("seed_bench", "seed")
    published = 19_242
    server = "the leaderboard of SEED-Bench"

    def questions(self, place: Place) -> list[Question]:
        known, picture = _read(place), _pictures(place)
        path = place.find(LLAVA)
        asked = _llavas(path, known, picture) if path else [_question(one, picture) for one in known]
        _warn_of_frames(asked, picture)
        return asked

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        asked, picture = _read(place), _pictures(place)
        given = {str(one.id): one for one in answers}
        items = [_item(_question(one, picture), one, given.get(one.id)) for one in asked]
        pairs = [(one, bool(found["correct"])) for one, found in zip(asked, items, strict=True)]
        kinds = accuracies("data", ((kind, right) for kind in KINDS for one, right in pairs if one.kind == kind))
        types = sorted(pairs, key=lambda pair: pair[0].type)
        return Result(
            scores={
                "accuracy": percent(sum(right for _, right in pairs), len(pairs)),
                **{f"{row['data']}_accuracy": row["accuracy"] for row in kinds},
                **of_answered(items),
            },
            headline="accuracy",
            questions=len(asked),
            answered=sum(one.id in given for one in asked),
            tables={
                "Accuracy / question type": accuracies("type", ((one.type_name, right) for one, right in types)),
                "Accuracy / data": kinds,
            },
            items=items,
            remarks=_remarks(asked, answers, picture),
        )

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """seed_bench.jsonl: {question_id, prediction} for every question in its order."""
        asked = _read(place)
        given = {str(one.id): one.text for one in answers}
        if missing := [one.id for one in asked if one.id not in given]:
            more = f"{len(missing):,} of {len(asked):,} are missing"
            raise ValueError(f"{UPLOAD}: the leaderboard takes all questions, and {missing[0]} has no answer ({more})")
        rows = [json.dumps({"question_id": one.row_id, "prediction": given[one.id]}) + "\n" for one in asked]
        return [official.write(out / UPLOAD, "".join(rows))]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question of SEED-Bench.json. `row_id` is its id as it stands there, `id` as it is compared."""

    row_id: int | str
    text: str
    answer: str
    kind: str
    type: int
    type_name: str
    picture: str

    @property
    def id(self) -> str:
        return str(self.row_id)


Picture = Callable[[str], Image]
"""Where a picture lies, by its name from the benchmark's folder."""


def _item(question: Question, one: Asked, given: Answer | None) -> dict[str, Any]:
    text = None if given is None else given.text
    return item(question, text, text == one.answer, type=one.type, data_type=one.kind)


def _remarks(asked: Sequence[Asked], answers: Sequence[Answer], picture: Picture) -> dict[str, list[str]]:
    """What is odd. An id that stands for two questions may be answered twice."""
    questions = Counter(one.id for one in asked)
    given = Counter(str(one.id) for one in answers)
    missing = [one for one in asked if one.id not in given]
    found = {
        "foreign": [id for id in given if id not in questions],
        "duplicate": [id for id, count in given.items() if id in questions and count > questions[id]],
        "missing": [one.id for one in missing],
        "question ids that stand for several questions": [id for id, count in questions.items() if count > 1],
    }
    frames = Path(picture(FRAMES).path)
    if any(one.kind == "video" for one in missing) and not frames.is_dir():
        found["videos without frames"] = [f"{frames} is not there"]
    return {kind: names for kind, names in found.items() if names}


def _pictures(place: Place) -> Picture:
    """In the folder, or beside the questions."""
    beside = str(place.file(OFFICIAL).parent)
    return lambda name: place.picture(name, ".", beside)


def _warn_of_frames(asked: Iterable[Question], picture: Picture) -> None:
    count, frames = sum(f"{FRAMES}/" in image.path for one in asked for image in one.images), picture(FRAMES).path
    if count and not Path(frames).is_dir():
        console.warn(
            f"SEED-Bench: {count:,} questions are about videos, and {frames} is not there; put the middle frame of each"
            " there as TYPE_ID.png, or they go unanswered"
        )


def _llavas(path: Path, known: Sequence[Asked], picture: Picture) -> list[Question]:
    """The questions of LLaVA's file, which has an id twice as the official one does."""
    by_id = {one.id: one for one in known}
    return [
        Question(
            id=field(row, "question_id", path, number),
            text=field(row, "text", path, number),
            images=(picture(field(row, "image", path, number)),),
            category=one.type_name if (one := by_id.get(str(row["question_id"]))) else row.get("category", ""),
            truth=one.answer if one else "",
        )
        for number, row in enumerate(official.json_lines(path), 1)
    ]


def _question(one: Asked, picture: Picture) -> Question:
    return Question(
        id=one.row_id, text=one.text, images=(picture(one.picture),), category=one.type_name, truth=one.answer
    )


def _read(place: Place) -> list[Asked]:
    """ValueError that names file, question and key for one that is missing."""
    path = place.file(OFFICIAL)
    found = official.json_file(path)
    if not isinstance(found, dict):
        raise ValueError(f'{path}: {{"questions": [...], "question_type": {{...}}}} is expected; fetch it again')
    names = {id: name for name, id in field(found, "question_type", path, 1).items()}
    return [_asked(row, names, path, number) for number, row in enumerate(field(found, "questions", path, 1), 1)]


def _asked(row: dict[str, Any], names: Mapping[int, str], path: Path, number: int) -> Asked:
    id = field(row, "question_id", path, number)
    type, kind = field(row, "question_type_id", path, id), field(row, "data_type", path, id)
    choices = [f"{letter}. {field(row, f'choice_{letter.lower()}', path, id)}" for letter in "ABCD"]
    return Asked(
        row_id=id,
        text="\n".join([field(row, "question", path, id), *choices]) + LETTER,
        answer=field(row, "answer", path, id),
        kind=kind,
        type=type,
        type_name=names.get(type, f"type {type}"),
        picture=f"{FRAMES}/{type}_{id}.png" if kind == "video" else f"{IMAGES}/{field(row, 'data_id', path, id)}",
    )
