"""What flows through an evaluation: a question, its answer, and what all answers of a benchmark score.

Knows nothing of models, files or any benchmark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistune.samples import Image

Id = int | str
"""A question's id as its benchmark's file has it; 7 and "7" are the same question."""

Key = tuple[str, str]
"""What one question is known by: its id and its text, since MME asks two questions under one id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question as its benchmark asks it.

    `text` is the whole user turn; pictures without a mark in it come first, each on a line of its own, as LLaVA puts
    them. `truth` is what is right, for people. `row` is what the row of its answer carries beside (options, a round).
    """

    id: Id
    text: str
    images: tuple[Image, ...] = ()
    category: str = ""
    truth: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return str(self.id), self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, whoever gave it. `row` is all that its line said (LLaVA: question_id, prompt, text, answer_id,
    model_id, metadata)."""

    id: Id
    prompt: str
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return str(self.id), self.prompt


@dataclass(kw_only=True)
class Result:
    """What the answers of one benchmark score.

    `scores` are the official figures by name, on the scale they are published on; `headline` names the one that is
    quoted. `tables`: rows per category under a title. `items`: one object a question in the benchmark's order, with at
    least question_id, category, question, answer, truth and correct (true, false, or null where nothing is that).
    `remarks`: what was odd, by kind (missing, foreign, duplicate, broken, failed), as what people can look for.
    """

    scores: dict[str, float]
    headline: str
    questions: int
    answered: int
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    protocol: str = ""
    """Where it is not the benchmark's own: a prompt that was made up here, an answer cut short."""
    title: str = ""
    """Where its files say one."""
    judge: dict[str, Any] = field(default_factory=dict)
    """Who judged and when, as `judge.told` says it."""
    written: list[str] = field(default_factory=list)
    """Files for the official scorer that came of it."""

    @property
    def partial(self) -> bool:
        return self.answered < self.questions


def item(
    question: Question, answer: str | None, correct: bool | None, score: float | None = None, **more: Any
) -> dict[str, Any]:
    """One line of `Result.items`."""
    given: dict[str, Any] = {
        "question_id": question.id,
        "category": question.category,
        "question": question.text,
        "answer": answer,
        "truth": question.truth,
        "correct": correct,
    }
    return given | ({} if score is None else {"score": score}) | more


@dataclass(frozen=True)
class Matched:
    """Answers beside their questions: `answers[i]` is the last one to `questions[i]`, or None."""

    answers: list[Answer | None]
    remarks: dict[str, list[str]]

    @property
    def answered(self) -> int:
        return sum(one is not None for one in self.answers)


def match(questions: Sequence[Question], answers: Iterable[Answer], *, by_text: bool = False) -> Matched:
    """Answers to their questions by id, or by id and text. Of several answers to one question the last counts; that, an
    answer to no question, and a question without an answer are remarks. ValueError for two questions of one key."""
    known = [_key(one.id, one.text, by_text) for one in questions]
    if twice := [key for key, count in Counter(known).items() if count > 1]:
        raise ValueError(f"question_id {twice[0][0]}: {Counter(known)[twice[0]]} questions have it; ids must differ")
    places = {key: i for i, key in enumerate(known)}
    found: list[Answer | None] = [None] * len(questions)
    remarks: dict[str, list[str]] = {}
    for answer in answers:
        at = places.get(_key(answer.id, answer.prompt, by_text))
        if at is None:
            remarks.setdefault("foreign", []).append(str(answer.id))
            continue
        if found[at] is not None:
            remarks.setdefault("duplicate", []).append(str(answer.id))
        found[at] = answer
    if missing := [str(one.id) for one, answer in zip(questions, found, strict=True) if answer is None]:
        remarks["missing"] = missing
    return Matched(found, remarks)


def _key(id: Id, text: str, by_text: bool) -> Key:
    return str(id), text if by_text else ""


def accuracies(column: str, pairs: Iterable[tuple[Any, float]]) -> list[dict[str, Any]]:
    """Rows of a table, one for each group in the order of their appearance: the percentage of its questions that are
    right. `pairs`: the group of a question, and whether it is, or how much of it (0..1)."""
    groups: dict[Any, list[float]] = {}
    for group, score in pairs:
        groups.setdefault(group, []).append(score)
    return [
        {column: group, "accuracy": percent(sum(scores), len(scores)), "questions": len(scores)}
        for group, scores in groups.items()
    ]


def of_answered(items: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`accuracy_of_answered`, where some items have no answer and some have one: what a score in which a missing answer
    is a wrong one does not tell."""
    rights = [(one["answer"] is not None, bool(one["correct"])) for one in items]
    answered = [right for given, right in rights if given]
    if not answered or len(answered) == len(rights):
        return {}
    return {"accuracy_of_answered": percent(sum(answered), len(answered))}


def limited(questions: Sequence[Question], limit: int) -> list[int]:
    """The places of about `limit` questions, evenly over them; those of one id together, as MME scores pairs."""
    groups: dict[str, list[int]] = {}
    for at, question in enumerate(questions):
        groups.setdefault(str(question.id), []).append(at)
    each = list(groups.values())
    taken = spread(len(each), max(1, limit * len(each) // len(questions))) if limit else range(len(each))
    return sorted(at for number in taken for at in each[number])


def spread(count: int, limit: int) -> list[int]:
    """The places of `limit` of `count` questions, evenly over them; of all for 0."""
    return [i * count // limit for i in range(limit)] if 0 < limit < count else list(range(count))


def percent(part: float, whole: float) -> float:
    """`part` of `whole` in percent; 0 of nothing."""
    return 100.0 * part / whole if whole else 0.0
