"""An evaluation from top to bottom: questions, answers, scores, the official server's files, a page.

A table of contents: each step is a room of its own. `vistune evaluate` ends here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from vistune import __version__, console, ranks
from vistune.evaluate import official, page, score
from vistune.evaluate.answering import Answerer, Local, is_near_tie
from vistune.evaluate.benchmarks import Benchmark, benchmarks, named
from vistune.evaluate.items import Question, item
from vistune.evaluate.official import Place
from vistune.evaluate.subject import Settings, Subject, default_out, everywhere, from_first
from vistune.evaluate.written import ASKED, Written, questions_hash, replace
from vistune.samples import Image

ALONE = 16
"""Questions that are asked a second time, one by one, where the precision lets a batch change answers."""
SHOWN = 5
"""Of the questions that could not be asked, how many are named on the console; all are in scores.json."""


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


def evaluate(
    model: str | Path, names: Sequence[str], data: Path | str, out: Path | str | None, settings: Settings
) -> dict[str, Any]:
    """Ask `model` the questions of these benchmarks and score its answers. Returns what OUT/scores.json holds.

    Every rank calls it; they share the questions. What an earlier call left unfinished in `out` is gone on with.
    Raises ValueError for files that are missing, and for an `out` that holds answers of something else.
    """
    _check(settings, names)
    subject = Subject(str(model), settings)
    out = Path(out) if out else default_out(str(model))
    sets = everywhere(lambda: _sets(names, Path(data), settings))
    console.say(f"{subject.name}: {subject.precision}, {settings.batch} questions at once; results go to {out}")
    found = _about(subject, settings)
    items: dict[str, list[dict[str, Any]]] = {}
    for one in sets:
        told = _ask(one, subject, settings, out / one.name)
        scored = from_first(partial(_scored, one, told, settings, out / one.name))
        items[one.name] = scored.pop("items")
        found["benchmarks"][one.name] = scored
        _add(found, told)
    return from_first(partial(_finish, out, found, items, sets, subject, Path(data)))


def _check(settings: Settings, names: Sequence[str]) -> None:
    if not names:
        raise ValueError("--benchmark: which ones? Names with commas between, see docs/evaluate.md")
    for key in ("batch", "limit", "max_new_tokens"):
        if (value := getattr(settings, key)) < (key == "batch"):
            raise ValueError(f"--{key.replace('_', '-')} {value}: must be {1 if key == 'batch' else 0} or more")


def _sets(names: Sequence[str], data: Path, settings: Settings) -> list[Set]:
    """Everything that is to be asked, before a model is opened. ValueError for a file that is missing."""
    sets = []
    for benchmark in {named(name).name: named(name) for name in names}.values():
        place = official.place(data, benchmark.folders, settings.images)
        questions = benchmark.questions(place)
        if not questions:
            raise ValueError(f"{place.root}: {benchmark.title} has no questions there")
        sets.append(Set(benchmark, place, questions, settings.max_new_tokens or benchmark.tokens(place)))
    return sets


@dataclass
class Told:
    """What came of asking: the answers on disk, what could not be asked and why (by place), how many answers were made
    in how many seconds, and how they compare with the same questions asked alone."""

    written: Written
    errors: dict[int, str]
    made: int
    seconds: float
    alone: dict[str, Any] | None = None


def _ask(one: Set, subject: Subject, settings: Settings, folder: Path) -> Told:
    """Every question that has no answer on disk yet. ValueError when not one could be asked."""
    asked = {
        **subject.identity,
        "protocol": one.benchmark.protocol,
        "max_new_tokens": one.tokens,
        "questions": questions_hash(one.questions),
    }
    written = Written(folder, one.questions, asked, subject.name)
    chosen = spread(len(one.questions), settings.limit)
    left = [at for at in chosen if written.rows[at] is None]
    if left and len(left) < len(chosen):
        console.say(f"{one.benchmark.title}: {len(chosen) - len(left):,} of {len(chosen):,} are answered; going on")
    answerer = subject.open() if left else None
    mine = shares(one.questions, left, ranks.world())[ranks.rank()]
    errors, started = {}, time.monotonic()
    if answerer is not None:
        errors = _answered(one, answerer, written, mine)
    written.merge()
    seconds = time.monotonic() - started
    for theirs in ranks.gather(errors):
        errors |= theirs
    if errors and len(errors) == len(chosen):
        raise ValueError(f"{one.benchmark.title}: not one question could be asked; the first: {_named(one, errors)[0]}")
    told = Told(written, errors, len(left) - len(errors), seconds if left else 0.0)
    if answerer is not None and ranks.is_first():
        told.alone = _alone(one, answerer, subject.precision, [at for at in mine if at not in errors], written)
    return told


def _answered(one: Set, answerer: Answerer, written: Written, mine: Sequence[int]) -> dict[int, str]:
    """Ask this rank's share, each answer on disk as it comes; returns what could not be asked."""
    errors = {}
    share = "" if ranks.world() == 1 else f" (1 of {ranks.world()} shares)"
    with console.progress() as bar:
        task = bar.add_task(one.benchmark.title + share, total=len(mine))
        for at, said in answerer.answer([one.questions[at] for at in mine], one.tokens):
            if said.error:
                errors[mine[at]] = said.error
            else:
                written.write(mine[at], said)
            bar.advance(task)
    return errors


def _alone(
    one: Set, answerer: Answerer, precision: str, answered: Sequence[int], written: Written
) -> dict[str, Any] | None:
    """How many of a few answers are the same when their questions are asked one by one; None in fp32, where all are
    but for near ties, and from a server."""
    if not isinstance(answerer, Local) or answerer.batch == 1 or precision == "fp32" or not answered:
        return None
    few = [answered[i] for i in spread(len(answered), ALONE)]
    single = Local(answerer.loaded, 1, answerer.name)
    same = 0
    for at, said in single.answer([one.questions[at] for at in few], one.tokens):
        row = written.rows[few[at]]
        same += row is not None and row["text"] == said.text
    console.say(f"{precision}: {same} of {len(few)} answers are the same when asked alone")
    return {"questions": len(few), "same": same}


def spread(count: int, limit: int) -> list[int]:
    """The places of `limit` of `count` questions, evenly over them; of all for 0."""
    return [i * count // limit for i in range(limit)] if 0 < limit < count else list(range(count))


def shares(questions: Sequence[Question], places: Sequence[int], world: int) -> list[list[int]]:
    """These places dealt to so many ranks, long questions to each in turn; in order, so that neighbours stay near."""
    order = sorted(places, key=lambda at: (-len(questions[at].images), -len(questions[at].text), at))
    turns = [order[i : i + world][:: -1 if i // world % 2 else 1] for i in range(0, len(order), world)]
    dealt: list[list[int]] = [[] for _ in range(world)]
    for number, turn in enumerate(turns):
        first = world - len(turn) if number % 2 else 0
        for rank, at in enumerate(turn, first):
            dealt[rank].append(at)
    return [sorted(share) for share in dealt]


def _scored(one: Set, told: Told, settings: Settings, folder: Path) -> dict[str, Any]:
    """What the answers score, on the console and in the benchmark's folder."""
    answers = told.written.answers()
    result = score.judged(one.benchmark, one.place, answers, settings.judge, folder / "judged.jsonl", folder)
    result.items = result.items or _said(one, told)
    if told.errors:
        result.remarks["unreadable"] = _named(one, told.errors)
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
    if 0 < settings.limit < len(one.questions):
        said.append(f"{settings.limit:,} questions spread over it")
    if settings.quantize:
        said.append(f"language model in {settings.quantize}")
    if settings.template:
        said.append(f"template {settings.template}")
    return said


def _named(one: Set, errors: dict[int, str]) -> list[str]:
    return [f"{one.questions[at].id}: {errors[at]}" for at in sorted(errors)]


def _about(subject: Subject, settings: Settings) -> dict[str, Any]:
    return {
        "model": subject.model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "vistune": __version__,
        **{key: value for key, value in subject.identity.items() if key != "model"},
        "precision": subject.precision,
        "batch": settings.batch,
        "processes": ranks.world(),
        "seconds": 0.0,
        "answers": 0,
        "answers_per_s": 0.0,
        "near_ties": 0,
        "benchmarks": {},
    }


def _add(found: dict[str, Any], told: Told) -> None:
    """Time and counts over all benchmarks so far; only answers that were made now have a speed."""
    found["seconds"] += told.seconds
    found["answers"] += told.made
    found["answers_per_s"] = found["answers"] / found["seconds"] if found["seconds"] else 0.0


def _finish(
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
    return "partial" if found["partial"] else "subset" if found["subset"] else "scored elsewhere"


def _json(path: Path, value: Any) -> None:
    replace(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
