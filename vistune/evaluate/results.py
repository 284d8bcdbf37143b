"""What came of asking: scored and written, benchmark by benchmark, then all of it in one file and on one page.

Knows answers that are on disk, not how they came there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune import console
from vistune.evaluate import official, page, score
from vistune.evaluate.answering import is_near_tie
from vistune.evaluate.benchmarks import Benchmark, benchmarks
from vistune.evaluate.items import Question, item, limited
from vistune.evaluate.official import Place
from vistune.evaluate.subject import Settings, Subject
from vistune.evaluate.written import ASKED, Written
from vistune.samples import Image


@dataclass(frozen=True)
class Set:
    """A benchmark with its files found and read."""

    benchmark: Benchmark
    place: Place
    questions: list[Question]
    tokens: int

    @property
    def name(self) -> str:
        return self.benchmark.name


@dataclass
class Told:
    """What came of asking: the answers on disk, what could not be asked and why (by place), how many answers were made
    in how many seconds, and how they compare with the same questions asked alone."""

    written: Written
    errors: dict[int, str]
    made: int
    seconds: float
    alone: dict[str, Any] | None = None


def scored(one: Set, told: Told, settings: Settings, folder: Path) -> dict[str, Any]:
    """What the answers score, on the console and in the benchmark's folder."""
    answers = told.written.answers()
    result = score.judged(one.benchmark, one.place, answers, settings.judge, folder / "judged.jsonl", folder)
    result.items = result.items or _said(one, told)
    if told.errors:
        result.remarks["unreadable"] = named_errors(one, told.errors)
    found = score.as_dict(one.benchmark, result, _submitted(one, told, folder, result.remarks))
    found |= {"protocol": ", ".join([found["protocol"], *_departures(one, settings)]), "max_new_tokens": one.tokens}
    unanswered = sum(row is None for row in told.written.rows)
    if unanswered and not found["partial"]:
        found |= {"partial": True, "score": None, "answered": len(answers), "questions": len(one.questions)}
        found["share"] = len(answers) / len(one.questions)
    found["near_ties"] = sum(is_near_tie(answer.row["metadata"]["margin"]) for answer in answers)
    found["alone"] = told.alone
    _lines(folder / "items.jsonl", found["items"])
    _json(folder / "scores.json", {key: value for key, value in found.items() if key != "items"})
    score.show(found)
    return found


def _said(one: Set, told: Told) -> list[dict[str, Any]]:
    """What was said, where nothing here can say whether that is right."""
    rows = zip(one.questions, told.written.rows, strict=True)
    return [item(question, row["text"] if row else None, None) for question, row in rows]


def _submitted(one: Set, told: Told, folder: Path, remarks: dict[str, list[str]]) -> list[Path]:
    """The official server's files; why there are none is a remark."""
    try:
        return one.benchmark.submission(one.place, told.written.answers(), folder)
    except ValueError as error:
        remarks["submission"] = [str(error)]
        return []


def _departures(one: Set, settings: Settings) -> list[str]:
    """Where this evaluation leaves the protocol."""
    said = []
    if settings.max_new_tokens and settings.max_new_tokens != one.benchmark.tokens(one.place):
        said.append(f"max_new_tokens {settings.max_new_tokens}")
    if (asked := len(limited(one.questions, settings.limit))) < len(one.questions):
        said.append(f"{asked:,} questions spread over it")
    if settings.quantize:
        said.append(f"language model in {settings.quantize}")
    if settings.template:
        said.append(f"template {settings.template}")
    return said


def named_errors(one: Set, errors: dict[int, str]) -> list[str]:
    return [f"{one.questions[at].id}: {errors[at]}" for at in sorted(errors)]


def finish(
    out: Path,
    found: dict[str, Any],
    items: dict[str, list[dict[str, Any]]],
    sets: Sequence[Set],
    subject: Subject,
    data: Path,
) -> dict[str, Any]:
    """All of `out` in one file and on one page: what was asked now, and of this model before."""
    questions = {one.name: one.questions for one in sets}
    for name in _earlier(out, subject, list(questions)):
        found["benchmarks"][name] = json.loads((out / name / "scores.json").read_text(encoding="utf-8"))
        lines = (out / name / "items.jsonl").read_text(encoding="utf-8").splitlines()
        items[name], questions[name] = [json.loads(line) for line in lines], _asked_before(name, data, subject)
    found["near_ties"] = sum(one["near_ties"] for one in found["benchmarks"].values())
    pictures: dict[str, dict[str, list[Image]]] = {
        name: {str(question.id): list(question.images) for question in some} for name, some in questions.items()
    }
    _json(out / "scores.json", found)
    written = page.write(out, found, items, pictures)
    rows = [
        (each["title"], _quoted(each), each["headline"], f"{each['answered']:,} of {each['questions']:,}")
        for each in found["benchmarks"].values()
    ]
    console.table(f"{found['model']}", ("benchmark", "score", "which", "answered"), rows)
    speed = f"{found['answers']:,} answers in {found['seconds']:.0f} s ({found['answers_per_s']:.2f} a second)"
    ties = f", {found['near_ties']:,} near ties" if found["near_ties"] else ""
    console.say(f"{speed}{ties}; scores: {out / 'scores.json'}, page: {written}")
    return found


def _earlier(out: Path, subject: Subject, now: Sequence[str]) -> list[str]:
    """Benchmarks that this model, asked in this way, was scored on before, in the same folder."""
    found = []
    for note in sorted(out.glob(f"*/{ASKED}")):
        name = note.parent.name
        whole = all((note.parent / file).is_file() for file in ("scores.json", "items.jsonl"))
        if name in benchmarks() and name not in now and whole:
            asked = json.loads(note.read_text(encoding="utf-8"))
            if all(asked.get(key) == value for key, value in subject.identity.items() if key != "model"):
                found.append(name)
    return found


def _asked_before(name: str, data: Path, subject: Subject) -> list[Question]:
    """The questions of an earlier evaluation, for their pictures; none where their files lie elsewhere."""
    benchmark = benchmarks()[name]
    try:
        return benchmark.questions(official.place(data, benchmark.folders, subject.settings.images))
    except ValueError as error:
        console.warn(f"{benchmark.title}: the page shows no pictures of it: {error}")
        return []


def _quoted(found: dict[str, Any]) -> str:
    """The figure that may be called the benchmark's score, or why there is none."""
    if found["score"] is not None and not found["subset"]:
        return f"{found['score']:.2f}"
    if found["partial"] or not found["scores"]:
        return "partial" if found["partial"] else "not judged" if found["judged"] else "scored elsewhere"
    return "subset"


def _json(path: Path, value: Any) -> None:
    official.write(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    official.write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
