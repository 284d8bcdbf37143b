"""GQA: questions about scenes, answered with a word or a phrase. Asks, scores and says what GQA's evaluator says."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune.evaluate import official
from vistune.evaluate.benchmarks import SHORT, Benchmark
from vistune.evaluate.items import Answer, Matched, Question, Result, accuracies, item, match, of_answered, percent
from vistune.evaluate.official import Place, field

OFFICIAL = "testdev_balanced_questions.json"
LLAVA = "llava_gqa_testdev_balanced.jsonl"
PREDICTIONS = "testdev_balanced_predictions.json"
PICTURES = ("data/images", "images")

NOT_STEPS = ("exist", "query: name", "choose name")
"""Operations of a question's program that ask and do not reason (GQA's eval.py); each may be part of a longer one."""


class Gqa(Benchmark):
    """GQA, the balanced part of testdev.

    Files, in the folder or in `data` below it:
        testdev_balanced_questions.json   {id: {question, imageId, answer, isBalanced, types, semantic, groups}, ...}
        llava_gqa_testdev_balanced.jsonl  {question_id, image, text, category}; says the order of asking, may be absent
        images/n161313.jpg
    Prompt: the question and `SHORT`.
    Score: an answer, without full stops at its end and in small letters, is the official answer or it is wrong. The
    accuracy is over the questions that are balanced; beside it binary and open questions apart, the distance of the
    answers' distribution from the true one (chi square, lower is better), and tables by type and length. Validity
    and plausibility need testdev_balanced_choices.json, consistency answers to all of testdev, grounding attention
    maps: none of them is in the published files, and none is scored.
    """

    name = "gqa"
    title = "GQA"
    folders = ("gqa",)
    published = 12_578

    def questions(self, place: Place) -> list[Question]:
        asked = _asked(place.file(OFFICIAL))
        if (path := place.find(LLAVA)) is None:
            return [_question(place, one) for one in asked.values()]
        return [
            Question(
                id=row["question_id"],
                text=row["text"],
                images=(place.picture(row["image"], *PICTURES),),
                category=known.category if (known := asked.get(str(row["question_id"]))) else "",
                truth=known.answer if known else "",
            )
            for row in official.question_rows(path, "image")
        ]

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        asked = list(_asked(place.file(OFFICIAL)).values())
        questions = [_question(place, one) for one in asked]
        matched = _balanced_only(match(questions, answers), asked)
        predictions = [None if one is None else prediction(one.text) for one in matched.answers]
        items = [
            item(
                question,
                given.text if given else None,
                predicted == one.answer,
                prediction=predicted,
                balanced=one.balanced,
            )
            for question, one, given, predicted in zip(questions, asked, matched.answers, predictions, strict=True)
        ]
        counted = [(one, predicted) for one, predicted in zip(asked, predictions, strict=True) if one.balanced]
        return Result(
            scores=_scores(counted) | of_answered(one for one in items if one["balanced"]),
            headline="accuracy",
            questions=len(counted),
            answered=sum(predicted is not None for _, predicted in counted),
            tables=_tables(counted),
            items=items,
            remarks=matched.remarks,
        )

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """testdev_balanced_predictions.json, as GQA's eval.py takes it: the answers in their order."""
        asked = _asked(place.file(OFFICIAL))
        given = {str(one.id) for one in answers}
        if missing := [one.id for one in asked.values() if one.balanced and one.id not in given]:
            raise ValueError(
                f"{PREDICTIONS}: GQA's evaluator refuses it without an answer to question {missing[0]}"
                f" ({len(missing)} are missing)"
            )
        rows = [{"questionId": str(one.id), "prediction": prediction(one.text)} for one in answers]
        return [official.write(out / PREDICTIONS, json.dumps(rows))]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question of the official file, as far as its evaluator looks at it."""

    id: str
    text: str
    picture: str
    answer: str
    balanced: bool
    structural: str
    semantic: str
    group: str | None
    steps: int

    @property
    def category(self) -> str:
        return f"{self.structural} {self.semantic}"


Counted = Sequence[tuple[Asked, str | None]]
"""Balanced questions and what was predicted; None where nothing was answered, which is wrong."""


def prediction(text: str) -> str:
    """What is compared, and what goes into the predictions file. Spaces at the ends stay, and are wrong."""
    return text.rstrip(".").lower()


def distribution(triples: Iterable[tuple[str | None, str, str | None]]) -> float:
    """Chi square between true and predicted answers in each group, averaged over the groups by their sizes, / 100.

    `triples`: group, answer, prediction. A group that is None is left out, and so is a prediction that no answer of
    the group is.
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for group, answer, given in triples:
        if group is not None:
            gold[group][answer] += 1
            if given is not None:
                predicted[group][given] += 1
    total = sum(counts.total() for counts in gold.values())
    score = sum(
        counts.total() * sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in gold.items()
    )
    return score / total / 100 if total else 0.0


def _scores(counted: Counted) -> dict[str, float]:
    rights = [(one.structural == "query", predicted == one.answer) for one, predicted in counted]
    parts = {name: [right for query, right in rights if query is wanted] for name, wanted in _PARTS.items()}
    return {
        "accuracy": percent(sum(right for _, right in rights), len(rights)),
        **{name: percent(sum(part), len(part)) for name, part in parts.items()},
        "distribution": distribution((one.group, one.answer, predicted) for one, predicted in counted),
    }


_PARTS = {"binary": False, "open": True}
"""Open questions are those that query; all others can be answered with yes, no, or one of two choices."""


def _tables(counted: Counted) -> dict[str, list[dict[str, Any]]]:
    columns: dict[str, dict[str, Any]] = {
        "structural type": {one.id: one.structural for one, _ in counted},
        "semantic type": {one.id: one.semantic for one, _ in counted},
        "steps number": {one.id: one.steps for one, _ in counted},
        "words number": {one.id: len(one.text.split()) for one, _ in counted},
    }
    return {
        f"Accuracy / {column}": accuracies(
            column, sorted((groups[one.id], predicted == one.answer) for one, predicted in counted)
        )
        for column, groups in columns.items()
    }


def _question(place: Place, one: Asked) -> Question:
    picture = place.picture(one.picture, *PICTURES)
    return Question(id=one.id, text=one.text + SHORT, images=(picture,), category=one.category, truth=one.answer)


def _asked(path: Path) -> dict[str, Asked]:
    """The official file by id, in its order. ValueError that names file, question and key for one that is missing."""
    rows = official.json_file(path)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path}: questions are {{id: {{question, answer, ...}}}} there; fetch it again")
    return {id: _read(id, row, path) for id, row in rows.items()}


def _read(id: str, row: dict[str, Any], path: Path) -> Asked:
    types = field(row, "types", path, id)
    return Asked(
        id=id,
        text=field(row, "question", path, id),
        picture=f"{field(row, 'imageId', path, id)}.jpg",
        answer=field(row, "answer", path, id),
        balanced=bool(field(row, "isBalanced", path, id)),
        structural=field(types, "structural", path, id),
        semantic=field(types, "semantic", path, id),
        group=field(field(row, "groups", path, id), "global", path, id),
        steps=_steps(field(row, "semantic", path, id)),
    )


def _steps(program: Iterable[Mapping[str, Any]]) -> int:
    """Operations of the program that are steps of reasoning."""
    written = [f"{one['operation']}: {one['argument']}" for one in program]
    return sum(not any(part in operation for part in NOT_STEPS) for operation in written)


def _balanced_only(matched: Matched, asked: Sequence[Asked]) -> Matched:
    """Questions that are not balanced may go unanswered."""
    balanced = {one.id for one in asked if one.balanced}
    missing = [id for id in matched.remarks.get("missing", []) if id in balanced]
    others = {kind: ids for kind, ids in matched.remarks.items() if kind != "missing"}
    return Matched(matched.answers, others | ({"missing": missing} if missing else {}))
