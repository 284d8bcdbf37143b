"""Answers in, scores out: what `vistune score` does, and what an evaluation ends in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistune import console
from vistune.evaluate import judge, official
from vistune.evaluate.benchmarks import Benchmark, Judged, named
from vistune.evaluate.items import Answer, Result
from vistune.evaluate.judge import Judge
from vistune.evaluate.official import Place

SHOWN = 5
"""Of what was odd, how many are named on the console; all of them are in the JSON."""


def score_file(
    name: str,
    data: Path,
    answers: Path,
    *,
    out: Path | None = None,
    images: Path | None = None,
    by: Judge | None = None,
) -> dict[str, Any]:
    """Score an answers file that any model made (LLaVA's JSON lines). `out` is where the official server's file goes.

    Returns what `as_dict` says. Raises ValueError for files that are missing or broken.
    """
    benchmark = named(name)
    place = official.place(data, benchmark.folders, images)
    given, broken = benchmark.read(answers)
    result = judged(benchmark, place, given, by, (out or answers.parent) / "judged.jsonl", out)
    if broken:
        result.remarks["broken"] = [f"{answers}:{number}" for number in broken]
    written = benchmark.submission(place, given, out) if out else []
    return as_dict(benchmark, result, written)


def judged(
    benchmark: Benchmark,
    place: Place,
    answers: Sequence[Answer],
    by: Judge | None,
    cache: Path,
    out: Path | None = None,
) -> Result:
    """What the answers score, by rule or, where the benchmark wants one and there is one, by a judge, whose replies are
    then written into the folder `out` as the official scorer keeps them."""
    if by is None or not isinstance(benchmark, Judged):
        return benchmark.score(place, answers)
    replies = judge.ask(by, benchmark.requests(place, answers), cache)
    result = benchmark.reviewed(place, answers, replies)
    result.judge = judge.told(by, replies)
    result.written += [str(path) for path in benchmark.reviews(place, answers, replies, out)] if out else []
    return result


def as_dict(benchmark: Benchmark, result: Result, written: Sequence[Path] = ()) -> dict[str, Any]:
    """The result as scores.json has it. `score` is the published figure, and null unless every question was answered;
    `subset` says that the files hold fewer questions than the published set."""
    whole = not result.partial
    return {
        "benchmark": benchmark.name,
        "title": result.title or benchmark.title,
        "protocol": result.protocol or benchmark.protocol,
        "score": result.scores.get(result.headline) if whole else None,
        "headline": result.headline,
        "partial": result.partial,
        "questions": result.questions,
        "answered": result.answered,
        "share": result.answered / result.questions if result.questions else 0.0,
        "published_questions": benchmark.published,
        "subset": benchmark.published is not None and result.questions < benchmark.published,
        "scores": result.scores,
        "tables": result.tables,
        "remarks": result.remarks,
        "submission": [*result.written, *(str(path) for path in written)],
        "scored_elsewhere": benchmark.server,
        "judged": benchmark.judged,
        "items": result.items,
    } | ({"judge": result.judge} if result.judge else {})


def show(found: dict[str, Any]) -> None:
    """The result as people read it: what is no score of the benchmark is not called one."""
    if found["scores"]:
        console.table(_title(found), ("score", "value"), [(name, _figure(v)) for name, v in found["scores"].items()])
    else:
        console.say(_title(found))
    for title, rows in found["tables"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        console.table(title, columns, [[_figure(row.get(key, "")) for key in columns] for row in rows])
    for kind, names in found["remarks"].items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        console.warn(f"{found['title']}: {len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    if by := found.get("judge"):
        console.say(judge_in_words(by))
    for path in found["submission"]:
        console.say(f"for {found['scored_elsewhere'] or 'the official scorer'}: {path}")


def _title(found: dict[str, Any]) -> str:
    said = f"{found['title']}, protocol {found['protocol']}"
    done = "answered and judged" if found.get("judge") else "answered"
    share = f"PARTIAL, {found['answered']:,} of {found['questions']:,} questions {done} ({found['share']:.1%})"
    if not found["scores"]:
        return f"{said}: {unscored(found)}" + (f"; {share}" if found["partial"] else "")
    if found["partial"]:
        return f"{said}: {share}; not the benchmark's score"
    if found["subset"]:
        share = f"{found['questions']:,} of the published {found['published_questions']:,} questions"
        return f"{said}: SUBSET, {share}; not the benchmark's score"
    return f"{said}: {found['questions']:,} questions"


def unscored(found: dict[str, Any]) -> str:
    """Why a result has no scores."""
    if found["benchmark"] == "custom":
        return "no right answers are given"
    why = "no judge was asked (--judge URL --judge-model NAME)" if found["judged"] else "no answers are published"
    return f"{why}, {found['scored_elsewhere'] or 'the official scorer'} scores it"


def judge_in_words(by: dict[str, Any]) -> str:
    """Who judged, when, and how many replies there were (`judge.told`)."""
    who = ", ".join(by["answered_as"]) or "an unnamed model"
    when = by["first"] if by["first"] == by["last"] else f"{by['first']} to {by['last']}"
    counts = f"{by['replies']:,} replies, {by['cached']:,} of them kept from before, {by['failed']:,} failed"
    return f"judge {by['model']} at {by['url']}, which answered as {who}, {when}: {counts}"


def _figure(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1 else f"{value:,.2f}"
