"""TextVQA: questions about text in pictures. Asks with what an OCR system read or without, scores by M4C's rule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vistune.evaluate import official, people, scoring
from vistune.evaluate.benchmarks import PROTOCOL, SHORT, Benchmark
from vistune.evaluate.items import Answer, Key, Question, Result, accuracies, item, percent
from vistune.evaluate.official import Place, field

ANNOTATIONS = "TextVQA_0.5.1_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"
PICTURES = ("train_images", "train_val_images/train_images", "images")

OCR = "Reference OCR token: "
OLD_OCR = "OCR tokens: "
"""How a prompt says what an OCR system read: LLaVA-1.5's line, and the start of an older layout."""

WITH, WITHOUT = "with OCR tokens", "without OCR tokens"


class TextVqa(Benchmark):
    """TextVQA 0.5.1, val.

    Files, in the folder or below it:
        TextVQA_0.5.1_val.json             {data: [{question, image_id, answers: ten of them}, ...]}
        llava_textvqa_val_v051_ocr.jsonl   {question_id: the picture's id, image, text, category}: what LLaVA asks
        TextVQA_Rosetta_OCR_v0.2_val.json  {data: [{image_id, ocr_tokens}, ...]}
        train_images/003a8ae2ef43b901.jpg
    Prompt: the question, a line "Reference OCR token: DAKOTA, DIGITAL", and `SHORT`. LLaVA's file is asked as it is.
    Where it is not there, prompts are made of TextVQA's own file: with that line where the Rosetta file lies there or
    the rows have `ocr_tokens`; else without, which is a harder test (13B: 48.7 instead of 61.3). Published scores of
    LLaVA are with OCR tokens. Which of both was asked is read off the prompts and said in the remarks, a table, and,
    where no prompt has them, in the protocol's name.
    Score: the prompt tells the question, with the picture's id that tells ten people's answers; all are normalised;
    what ten people agreed on counts as `scoring.textvqa` says. The mean in percent is over the answers, so a question
    that is answered twice counts twice.
    """

    name = "textvqa"
    title = "TextVQA"
    also = ("text_vqa", "textvqa_val")
    folders = ("textvqa",)
    published = 5_000

    def questions(self, place: Place) -> list[Question]:
        if (path := place.find(LLAVA)) is None:
            return _made(place)
        source = place.find(ANNOTATIONS)
        known = {one.key: one for one in _truths(source)} if source else {}
        return [_asked(place, row, number, path, known) for number, row in enumerate(official.json_lines(path), 1)]

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        truths = _truths(place.file(ANNOTATIONS))
        known = {one.key: one for one in truths}
        keys = [(str(one.id), _question_of(one, number)) for number, one in enumerate(answers, 1)]
        items = [
            _item(row, answer, known[key])
            for row, (answer, key) in enumerate(zip(answers, keys, strict=True))
            if key in known
        ]
        kinds = [(kind_of(answer.prompt), key) for answer, key in zip(answers, keys, strict=True) if key in known]
        scores = [float(one["score"]) for one in items]
        given = {key for _, key in kinds}
        table = accuracies("prompt", [(kind, score) for (kind, _), score in zip(kinds, scores, strict=True)])
        return Result(
            scores={"accuracy": percent(sum(scores), len(scores))},
            headline="accuracy",
            questions=len(truths),
            answered=sum(one.key in given for one in truths),
            tables={"prompts": table} if table else {},
            items=items,
            remarks=_remarks(keys, known) | _prompts({kind for kind, _ in kinds}),
            protocol=f"{PROTOCOL}, {WITHOUT}" if {kind for kind, _ in kinds} == {WITHOUT} else "",
        )


@dataclass(frozen=True)
class Truth:
    """A question of the official file, and what ten people answered."""

    image: str
    question: str
    people: Sequence[str]
    tokens: Sequence[str] | None

    @property
    def key(self) -> Key:
        return self.image, self.question.lower()

    @cached_property
    def scores(self) -> dict[str, float]:
        """Normalised answer -> what it scores."""
        try:
            return scoring.textvqa(self.people)
        except ValueError as error:
            raise ValueError(f"{ANNOTATIONS}: image {self.image}, {self.question!r}: {error}") from None


def question_in(prompt: str) -> str | None:
    """The question of a prompt in one of LLaVA's layouts, in small letters; None for any other layout.

    "OCR tokens: a b Question: Q Short answer:" has it between; of three lines with "Reference OCR token: " the first
    has it, or the second where the tokens come first; of two lines the first.
    """
    if prompt.startswith(OLD_OCR):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found[1].lower() if found else None
    lines = prompt.split("\n")
    if len(lines) == 3 and OCR in prompt:
        return lines[1 if prompt.startswith(OCR.rstrip()) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def kind_of(prompt: str) -> str:
    return WITH if OCR in prompt or prompt.startswith(OLD_OCR) else WITHOUT


def _question_of(answer: Answer, number: int) -> str:
    if (found := question_in(answer.prompt)) is None:
        raise ValueError(
            f"answers, row {number} (question_id {answer.id}): its prompt {answer.prompt[:80]!r} is in no layout that"
            f" TextVQA's scorer knows, so its question is not known; score answers with the prompts that were asked"
        )
    return found


def _item(row: int, answer: Answer, truth: Truth) -> dict[str, Any]:
    given = scoring.normalise(answer.text)
    score = truth.scores.get(given, 0.0)
    asked = Question(id=answer.id, text=answer.prompt, truth=people.agreed(truth.people))
    return item(
        asked,
        answer.text,
        score > 0,
        score,
        row=row,
        parsed_question=truth.key[1],
        normalised_pred=given,
        answer_scores=truth.scores,
    )


def _remarks(keys: Sequence[Key], known: Mapping[Key, Truth]) -> dict[str, list[str]]:
    """Answers to no question, to one that was answered before, and questions without an answer."""
    seen: set[Key] = set()
    found: dict[str, list[str]] = {}
    for key in keys:
        kind = "foreign" if key not in known else "duplicate" if key in seen else None
        if kind:
            twice = "; it counts once more" if kind == "duplicate" else ""
            found.setdefault(kind, []).append(f"{_named(key)}{twice}")
        seen.add(key)
    missing = [_named(key) for key in known if key not in seen]
    return found | ({"missing": missing} if missing else {})


def _named(key: Key) -> str:
    return f"{key[0]} ({key[1]})"


def _prompts(kinds: set[str]) -> dict[str, list[str]]:
    said = {WITH: "with OCR tokens, as published scores are", WITHOUT: "without OCR tokens, unlike published scores"}
    return {"prompts": [said[kind] for kind in (WITH, WITHOUT) if kind in kinds]}


def _truths(path: Path) -> list[Truth]:
    return [
        Truth(
            image=str(field(row, "image_id", path, number)),
            question=field(row, "question", path, number),
            people=field(row, "answers", path, number),
            tokens=row.get("ocr_tokens"),
        )
        for number, row in enumerate(_data(path), 1)
    ]


def _asked(place: Place, row: dict[str, Any], number: int, path: Path, known: Mapping[Key, Truth]) -> Question:
    text, id = field(row, "text", path, number), field(row, "question_id", path, number)
    truth = known.get((str(id), question_in(text) or ""))
    return Question(
        id=id,
        text=text,
        images=(place.picture(field(row, "image", path, number), *PICTURES),),
        category=str(row.get("category", "")),
        truth=people.agreed(truth.people) if truth else "",
    )


def _made(place: Place) -> list[Question]:
    """The prompts of LLaVA's file made of TextVQA's, with OCR tokens where there are any."""
    path = place.find(ROSETTA)
    read = {str(row["image_id"]): row["ocr_tokens"] for row in _data(path)} if path else {}
    return [
        Question(
            id=one.image,
            text=one.question + _ocr_line(read.get(one.image, [] if path else one.tokens)) + SHORT,
            images=(place.picture(f"{one.image}.jpg", *PICTURES),),
            truth=people.agreed(one.people),
        )
        for one in _truths(place.file(ANNOTATIONS))
    ]


def _ocr_line(tokens: Sequence[str] | None) -> str:
    """None: nobody looked; an empty list: nothing was read, and the line is there all the same."""
    return "" if tokens is None else f"\n{OCR}{', '.join(tokens)}"


def _data(path: Path) -> list[dict[str, Any]]:
    return official.members(path, "data", "textvqa.org")
