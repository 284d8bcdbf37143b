"""Questions that several people answered: what they agreed on, and what an answer scores against them.

Knows no benchmark; which rule compares is handed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistune.evaluate import official
from vistune.evaluate.items import Answer, Question, Result, accuracies, item, match, percent
from vistune.evaluate.official import Place
from vistune.evaluate.scoring import normalise

Rule = Callable[[str, Sequence[str]], float]
"""An answer and people's answers -> its score, 0..1."""

Rows = Callable[[Path], list[dict[str, Any]]]
"""A file of questions -> its rows as LLaVA writes them: question_id, image, text."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, what people answered, and which groups of the tables it belongs to, by the table's name."""

    question: Question
    people: Sequence[str]
    groups: Mapping[str, str] = field(default_factory=dict)


def agreed(people: Sequence[str]) -> str:
    """What most of them said; of several, what was said first."""
    return Counter(people).most_common(1)[0][0] if people else ""


def said(row: dict[str, Any], path: Path, id: object) -> list[str]:
    """What people answered, of a row whose `answers` are objects with an `answer`, as VQA and VizWiz publish them."""
    return [official.field(one, "answer", path, str(id)) for one in official.field(row, "answers", path, str(id))]


def scored(asked: Sequence[Asked], answers: Sequence[Answer], rule: Rule) -> Result:
    """VQA accuracy in percent over the questions that were answered; the others are remarked.

    Answers are normalised as LLaVA does before it hands them in, then compared by `rule`.
    """
    matched = match([one.question for one in asked], answers)
    items, counted = [], []
    for one, answer in zip(asked, matched.answers, strict=True):
        if answer is None:
            items.append(item(one.question, None, None))
            continue
        given = normalise(answer.text)
        score = rule(given, one.people)
        counted.append((one.groups, score))
        items.append(item(one.question, answer.text, score > 0, score, normalised_pred=given))
    tables = dict.fromkeys(table for groups, _ in counted for table in groups)
    return Result(
        scores={"accuracy": percent(sum(score for _, score in counted), len(counted))},
        headline="accuracy",
        questions=len(asked),
        answered=matched.answered,
        tables={
            table: accuracies(table, sorted((groups[table], score) for groups, score in counted)) for table in tables
        },
        items=items,
        remarks=matched.remarks,
    )


def are_open(place: Place, answers: Sequence[Answer], known: str, hidden: Sequence[str], rows: Rows) -> bool:
    """Whether these answers are to the set whose file `known` holds what is right, and not to the one of the `hidden`
    files, read by `rows`. Where both lie there, the answers' ids say it; where one does, they are to that."""
    if not place.find(known):
        return False
    if (path := place.find(*hidden)) is None:
        return True
    ids = {str(row["question_id"]) for row in rows(path)}
    return not any(str(one.id) in ids for one in answers)


def hidden(place: Place, row: Mapping[str, Any], *folders: str) -> Question:
    """A question whose answer nobody may know, of a row as LLaVA writes it; its picture lies in one of `folders`."""
    images = (place.picture(row["image"], *folders),)
    return Question(id=row["question_id"], text=row["text"], images=images, category=str(row.get("category", "")))


def unscored(questions: Sequence[Question], answers: Sequence[Answer], others: Sequence[str] = ()) -> Result:
    """Where nobody may know what is right: what was answered, and what a server will compare it as.

    `others`: ids that are not asked and may be answered.
    """
    allowed = set(others) - {str(one.id) for one in questions}
    matched = match(questions, [one for one in answers if str(one.id) not in allowed])
    texts = [None if answer is None else answer.text for answer in matched.answers]
    items = [
        item(question, text, None, normalised_pred=None if text is None else normalise(text))
        for question, text in zip(questions, texts, strict=True)
    ]
    return Result(
        scores={},
        headline="accuracy",
        questions=len(questions),
        answered=matched.answered,
        items=items,
        remarks=matched.remarks,
    )
