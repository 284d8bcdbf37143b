"""An evaluation from top to bottom: questions, answers, scores, the official server's files, a page.

A table of contents: each step is a room of its own. `vistune evaluate` ends here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from vistune import __version__, console, ranks
from vistune.evaluate import official
from vistune.evaluate.answering import Answerer, Local
from vistune.evaluate.benchmarks import named
from vistune.evaluate.items import Question, limited, spread
from vistune.evaluate.results import Set, Told, finish, named_errors, scored
from vistune.evaluate.subject import Settings, Subject, default_out, everywhere, from_first
from vistune.evaluate.written import Written, questions_hash

__all__ = ["Settings", "evaluate", "shares"]

ALONE = 16
"""Questions that are asked a second time, one by one, where the precision lets a batch change answers."""


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
        result = from_first(partial(scored, one, told, settings, out / one.name))
        items[one.name] = result.pop("items")
        found["benchmarks"][one.name] = result
        _add(found, told)
    return from_first(partial(finish, out, found, items, sets, subject, Path(data)))


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


def _ask(one: Set, subject: Subject, settings: Settings, folder: Path) -> Told:
    """Every question that has no answer on disk yet. ValueError when not one could be asked."""
    asked = {
        **subject.identity,
        "protocol": one.benchmark.protocol,
        "max_new_tokens": one.tokens,
        "questions": questions_hash(one.questions),
    }
    written = Written(folder, one.questions, asked, subject.name)
    chosen = limited(one.questions, settings.limit)
    left = [at for at in chosen if written.rows[at] is None]
    if left and len(left) < len(chosen):
        console.say(f"{one.benchmark.title}: {len(chosen) - len(left):,} of {len(chosen):,} are answered; going on")
    mine = shares(one.questions, left, ranks.world())[ranks.rank()]
    try:
        answerer = subject.open() if left else None
        started = time.monotonic()
        errors = _answered(one, answerer, written, mine) if answerer is not None else {}
        written.merge()
    finally:
        written.close()
    seconds = time.monotonic() - started
    for theirs in ranks.gather(errors):
        errors |= theirs
    if errors and len(errors) == len(chosen):
        raise ValueError(
            f"{one.benchmark.title}: not one question could be asked; the first: {named_errors(one, errors)[0]}"
        )
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
