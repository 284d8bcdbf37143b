"""MM-Vet: open questions that want several abilities at once; a judge grades each answer from 0.0 to 1.0."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from vistune.evaluate import official
from vistune.evaluate.benchmarks import PROTOCOL, Judged
from vistune.evaluate.items import Answer, Matched, Question, Result, item, match
from vistune.evaluate.judge import Reply, Request
from vistune.evaluate.official import Place

PREFIX = "v1_"
"""What a question's number is called in the benchmark's own file, and in what its scorer takes."""
ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
QUESTIONS, OWN_FILE, PROMPT = "llava-mm-vet.jsonl", "mm-vet.json", "prompt.txt"
LONGEST_GRADE = 16
"""Tokens; the official three cut a grade in two where another judge's tokenizer writes it in four."""

OWN_PROMPT = """\
You grade answers to questions about pictures. Each line of the table is one answer: the question, what is right, what \
was answered, and the grade, from 0.0 (all wrong) over 0.1, 0.2 and so on to 1.0 (all right). Where the right answer \
joins parts with <AND>, each part counts and an answer with some of them earns its share; where it joins them with \
<OR>, any one of them is enough. Wording does not matter, meaning does. Write the grade that is missing at the end, a \
number and nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
How many boats are in the harbour? | 4 | There are four boats in the harbour. | 1.0
How many boats are in the harbour? | 4 | I can see five boats. | 0.0
Which two fruits lie in the bowl? | pear <AND> plum | A pear, and an apple beside it. | 0.5
Which three flags hang there? | Norway <AND> Chile <AND> Japan | Those of Norway and of Japan. | 0.7
What colour is the door? | red <OR> dark red | It is a red door. | 1.0
What does the sign say? | closed on Mondays | It says "closed". | 0.4
Why do the people laugh at this drawing? | The dog walks the man on a leash, roles are swapped | A man and a dog \
take a walk together. | 0.2"""
OWN = f"{PROTOCOL}, prompt: vistune"
LABEL = re.compile(r"\A\W*(?:correctness|grade|score)(?:\s+score)?[\s:=*]+", re.IGNORECASE)
OF_ANOTHER_SCALE = (["/"], ["of"], ["out"], ["%"])
"""What stands behind a number that is no grade from 0 to 1."""


class MMVet(Judged):
    """Files: `llava-mm-vet.jsonl` (question_id, image, text), `images/`, and the benchmark's own `mm-vet.json`
    ({"v1_0": {imagename, question, answer, imagesource, capability}}), which has the answers and abilities that a judge
    needs; without the first the questions are made from it. `prompt.txt`: the official scorer's few-shot prompt, if you
    have it; without it one of our own words is sent, and the protocol says which.

    Prompt: the question as it is. The judge, at temperature 0, gets the few-shot table and its next line: question,
    right answer, answer, and an open place.

    Rule: the first word of a reply is a number from 0 to 1, or the reply is not read. `total` (published) is the mean,
    in percent; beside it stand the means over the questions that want each ability, and over those that want just one
    combination. A reply that failed or is not read is counted and scores nothing. In a file of grades made elsewhere
    ({"v1_0": {"model", "content", "score"}}, as the official scorer keeps them) such a reply has the grade 0.0 and
    enters the means, since that is the official arithmetic; the total without it stands beside.
    """

    name = "mmvet"
    title = "MM-Vet"
    also = ("mm_vet", "mm_vet_v1")
    folders = ("mm-vet", "mmvet")
    published = 218
    max_new_tokens = 1024
    server = "MM-Vet's official scorer"
    runs = 1
    """How often each answer is judged; the grades are averaged."""

    def questions(self, place: Place) -> list[Question]:
        place.file(QUESTIONS, OWN_FILE)  # one of both
        own = place.find(OWN_FILE)
        facts = _facts(place) if own else {}
        beside = [str(own.parent / "images")] if own else []
        return [
            Question(
                id=row["question_id"],
                text=row["text"],
                images=(place.picture(row["image"], "images", *beside),),
                category=_together(_fact(facts, row["question_id"]).get("capability", ())),
                truth=str(_fact(facts, row["question_id"]).get("answer", "")),
            )
            for row in _rows(place, facts)
        ]

    def read(self, path: Path) -> tuple[list[Answer], list[str]]:
        graded = _graded(path) if path.is_file() else None
        return official.answers(path) if graded is None else (graded, [])

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        """The grades of a judge elsewhere; answers alone have none. With no question file either, what is given is all
        that there is to count."""
        given = _numbered(answers)
        listed = place.find(QUESTIONS, OWN_FILE) is not None
        ids = dict.fromkeys(answer.id for answer in given)
        questions = self.questions(place) if listed else [Question(id=id, text="") for id in ids]
        matched = match(questions, given)
        items, failed, rest = [], [], []
        for question, answer in zip(questions, matched.answers, strict=True):
            grades, content = ([], []) if answer is None else _told(answer)
            unread = [said for said in content if parse_grade(said) is None]
            failed += [f"{question.id}: {said[:80]!r}" for said in unread]
            rest += [] if unread else grades
            items.append(_item(question, None if answer is None else answer.text, content, grades))
        result = _summed(items, matched, failed)
        result.answered = matched.answered
        if failed and rest:
            result.scores["total_without_failed"] = _mean(rest)
        return result

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """`mmvet-results.json`: {"v1_<question_id>": answer}, as the answers come, the last of several to one."""
        if any(_told(answer)[0] for answer in answers):
            return []  # grades, not answers
        told = {_number(answer.id): answer.text for answer in answers}
        written = json.dumps({f"{PREFIX}{number}": text for number, text in told.items()}, indent=2)
        return [official.write(out / "mmvet-results.json", written)]

    def requests(self, place: Place, answers: Sequence[Answer]) -> list[Request]:
        if any(_told(answer)[0] for answer in answers):
            raise ValueError("MM-Vet: these answers are a judge's grades already; score them without --judge")
        table, facts = _prompt(place), _facts(place)
        questions = self.questions(place)
        found = []
        for question, answer in zip(questions, match(questions, _numbered(answers)).answers, strict=True):
            if answer is None:
                continue
            if not (fact := _fact(facts, question.id)):
                raise ValueError(f"MM-Vet: question {question.id} is not in {OWN_FILE}, which has its right answer")
            line = " | ".join((fact["question"], _spaced(fact["answer"]), answer.text, ""))
            messages = ({"role": "user", "content": f"{table}\n{line}"},)
            found += [
                Request(id=_asked(question, run), messages=messages, max_tokens=LONGEST_GRADE, run=run)
                for run in range(self.runs)
            ]
        return found

    def reviewed(self, place: Place, answers: Sequence[Answer], replies: Mapping[str, Reply]) -> Result:
        questions = self.questions(place)
        matched = match(questions, _numbered(answers))
        items, failed = [], []
        for question, answer in zip(questions, matched.answers, strict=True):
            said = [replies.get(_asked(question, run), Reply(error="not asked")) for run in range(self.runs)]
            grades = [_grade(reply) for reply in said]
            if answer is not None:
                failed += [
                    _failure(question, reply) for reply, grade in zip(said, grades, strict=True) if grade is None
                ]
            text = None if answer is None else answer.text
            items.append(_item(question, text, [reply.text for reply in said], grades))
        result = _summed(items, matched, failed)
        result.protocol = PROTOCOL if place.find(PROMPT) else OWN
        return result

    def reviews(self, place: Place, answers: Sequence[Answer], replies: Mapping[str, Reply], out: Path) -> list[Path]:
        """`mmvet-grades.json`, {"v1_0": {"model", "content", "score"}} with a list entry for each run that was read."""
        found: dict[str, dict[str, list[Any]]] = {}
        for question in self.questions(place):
            said = [replies[id] for run in range(self.runs) if (id := _asked(question, run)) in replies]
            read = [(reply, grade) for reply in said if (grade := _grade(reply)) is not None]
            if read:
                found[f"{PREFIX}{_number(question.id)}"] = {
                    "model": [reply.model for reply, _ in read],
                    "content": [reply.text for reply, _ in read],
                    "score": [grade for _, grade in read],
                }
        return [official.write(out / "mmvet-grades.json", json.dumps(found, indent=4))]


def parse_grade(reply: str) -> float | None:
    """The number from 0 to 1 that a reply begins with, after a label of its own if it has one; None for anything
    else: 8, 1 / 10 and a sentence are no grades."""
    lines = LABEL.sub("", reply.replace("|", " ").strip()).strip().splitlines()
    words = lines[0].split() if lines else []
    word = words[0].strip("*`\"',;").rstrip(".") if words and words[1:2] not in OF_ANOTHER_SCALE else ""
    try:
        grade = float(word)
    except ValueError:
        return None
    return grade if math.isfinite(grade) and 0 <= grade <= 1 else None


def _grade(reply: Reply) -> float | None:
    return None if reply.error else parse_grade(reply.text)


def _mean(scores: Iterable[float]) -> float:
    """In percent."""
    return 100.0 * fmean(scores)


def _by_ability(rows: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Rows are (combination of abilities, score): a question counts for each of its abilities."""
    wanted = {name for combination, _ in rows for name in combination.split("_") if name}
    found = {name: [score for combination, score in rows if name in combination.split("_")] for name in _order(wanted)}
    return [{"ability": name, "questions": len(scores), "score": _mean(scores)} for name, scores in found.items()]


def _by_combination(rows: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The combinations that most questions want come first."""
    found: dict[str, list[float]] = {}
    for combination, score in rows:
        found.setdefault(combination, []).append(score)
    ordered = sorted(found.items(), key=lambda one: (-len(one[1]), one[0]))
    return [{"abilities": name, "questions": len(scores), "score": _mean(scores)} for name, scores in ordered]


def _by_run(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    runs = zip_longest(*(one["grades"] for one in items))
    found = [[grade for grade in one if grade is not None] for one in runs]
    return [
        {"run": run, "questions": len(grades), "total": _mean(grades)} for run, grades in enumerate(found, 1) if grades
    ]


def _order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (ABILITIES.index(name) if name in ABILITIES else len(ABILITIES), name))


def _together(abilities: Iterable[str]) -> str:
    """One name for a combination, whatever order its question lists it in."""
    return "_".join(_order(set(abilities)))


def _item(
    question: Question, answer: str | None, content: Sequence[str], grades: Sequence[float | None]
) -> dict[str, Any]:
    read = [grade for grade in grades if grade is not None]
    more = {"grades": list(grades), "content": list(content)}
    return item(question, answer, None, fmean(read) if read else None, **more)


def _summed(items: list[dict[str, Any]], matched: Matched, failed: list[str]) -> Result:
    """What the graded ones among the items amount to."""
    rows = [(str(one["category"]), float(one["score"])) for one in items if "score" in one]
    by_ability, by_run = _by_ability(rows), _by_run(items)
    abilities = {row["ability"]: row["score"] for row in by_ability}
    tables = {"by ability": by_ability, "by combination of abilities": _by_combination(rows)}
    return Result(
        scores={"total": _mean(score for _, score in rows)} | abilities if rows else {},
        headline="total",
        questions=len(items),
        answered=len(rows),
        tables={title: found for title, found in tables.items() if abilities}
        | ({"by run": by_run} if len(by_run) > 1 else {}),
        items=items,
        remarks=matched.remarks | ({"failed": failed} if failed else {}),
    )


def _failure(question: Question, reply: Reply) -> str:
    return f"{question.id}: {reply.error or f'unreadable: {reply.text[:80]!r}'}"


def _asked(question: Question, run: int) -> str:
    """The id of a request."""
    return f"{question.id} #{run + 1}" if run else str(question.id)


def _number(id: int | str) -> str:
    return str(id).removeprefix(PREFIX)


def _numbered(answers: Sequence[Answer]) -> list[Answer]:
    """Answers by their question's number, whether their file says 7 or v1_7."""
    return [replace(answer, id=_number(answer.id)) for answer in answers]


def _spaced(truth: str) -> str:
    return truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")


def _prompt(place: Place) -> str:
    path = place.find(PROMPT)
    return OWN_PROMPT if path is None else path.read_text(encoding="utf-8").rstrip("\n")


def _facts(place: Place) -> dict[str, dict[str, Any]]:
    """What the benchmark's own file says of each question, by its number."""
    path = place.file(OWN_FILE)
    found = official.json_file(path)
    if not isinstance(found, dict) or not all(isinstance(fact, dict) for fact in found.values()):
        raise ValueError(f"{path}: not MM-Vet's file, which is an object of {{v1_NUMBER: {{question, answer, ...}}}}")
    for name, fact in found.items():
        for key in ("question", "answer", "capability"):
            official.field(fact, key, path, name)
    return {_number(name): fact for name, fact in found.items()}


def _fact(facts: Mapping[str, dict[str, Any]], id: int | str) -> dict[str, Any]:
    return facts.get(_number(id), {})


def _rows(place: Place, facts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions as LLaVA lists them, or as the benchmark's own file does."""
    if (path := place.find(QUESTIONS)) is not None:
        return [row | {"question_id": _plain(row["question_id"])} for row in official.question_rows(path, "image")]
    return [
        {
            "question_id": _plain(number),
            "text": fact["question"],
            "image": fact.get("imagename", f"{PREFIX}{number}.png"),
        }
        for number, fact in facts.items()
    ]


def _plain(id: int | str) -> int | str:
    number = _number(id)
    return int(number) if number.isdecimal() else number


def _graded(path: Path) -> list[Answer] | None:
    """The grades of the official scorer's file, as answers without a text; None for a file of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # JSON lines, of answers
    if not isinstance(found, dict) or "question_id" in found:
        return None
    answers = [
        Answer(id=name, prompt="", text="", row=row if isinstance(row, dict) else {}) for name, row in found.items()
    ]
    for answer in answers:
        if not _told(answer)[0]:
            raise ValueError(f"{path}: {answer.id}: no grades; a row of them is {{model, content, score}}, each a list")
    return answers


def _told(answer: Answer) -> tuple[list[float], list[str]]:
    """The grades of a row of the official scorer's file and what the judge said; nothing for an answer."""
    scores, content = answer.row.get("score"), answer.row.get("content")
    if not isinstance(scores, list) or not all(isinstance(one, int | float) for one in scores):
        return [], []
    return [float(one) for one in scores], [str(one) for one in content] if isinstance(content, list) else []
