"""Benchmarks in the midst of training: which questions are asked, and what the answers score.

Files are read, and the rule of scoring is tried, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune import console
from vistune.evaluate import official, score
from vistune.evaluate.answering import Said
from vistune.evaluate.benchmarks import Benchmark, named
from vistune.evaluate.items import Answer, Question, Result
from vistune.evaluate.official import Place
from vistune.recipe import Evaluate


@dataclass(frozen=True)
class Chosen:
    """A benchmark with the questions of it that are asked, `tokens` at most being answered. `scores` are the names of
    its figures, none where nothing on this machine can score it; `headline` is the one that is quoted."""

    benchmark: Benchmark
    place: Place
    questions: list[Question]
    tokens: int
    scores: tuple[str, ...] = ()
    headline: str = ""

    @property
    def name(self) -> str:
        return self.benchmark.name


@dataclass(frozen=True)
class Scored:
    """What a row of `evaluations.jsonl` says of one benchmark; `share` of its questions were answered."""

    scores: dict[str, float]
    headline: float | None
    share: float
    samples: list[dict[str, Any]]


def read(settings: Evaluate) -> list[Chosen]:
    """The benchmarks that the recipe names. ValueError for names, folders and files that are not usable."""
    found: dict[str, Chosen] = {}
    for name in settings.benchmarks:
        benchmark = named(name)
        if benchmark.name in found:
            raise ValueError(f"evaluate.benchmarks: {benchmark.name} is there twice")
        found[benchmark.name] = _chosen(benchmark, Path(settings.data), settings.limit)
    return list(found.values())


def _chosen(benchmark: Benchmark, data: Path, limit: int) -> Chosen:
    if not data.is_dir():
        raise ValueError(
            f'evaluate.data = "{data}": no such folder; it holds the folders of {benchmark.name} and others'
        )
    place = official.place(data, benchmark.folders)
    questions = benchmark.questions(place)
    if not questions:
        raise ValueError(f"evaluate.benchmarks: {benchmark.name} in {place.root} has no questions")
    asked = spread(questions, limit)
    chosen = Chosen(benchmark, place, asked, benchmark.tokens(place))
    result = _score(chosen, [Said(text="") for _ in asked])
    if not result.scores:
        why = "a judge scores it" if benchmark.judged else benchmark.server or "its answers are not published"
        console.warn(f"evaluate.benchmarks: {benchmark.name} has no score here ({why}); answers are shown alone")
    return Chosen(benchmark, place, asked, chosen.tokens, tuple(result.scores), result.headline)


def spread(all: Sequence[Any], limit: int) -> list[Any]:
    """`limit` of them, evenly over the whole; all without a limit."""
    count = min(limit, len(all)) if limit else len(all)
    return [all[i * len(all) // count] for i in range(count)]


def scored(chosen: Chosen, said: Sequence[Said], shown: int) -> Scored:
    """What the answers score by the official rule, and `shown` of them for people. ValueError as the rule has it."""
    result = _score(chosen, said)
    share = result.answered / result.questions if result.questions else 0.0
    scores = {name: float(value) for name, value in result.scores.items()}
    return Scored(scores, scores.get(result.headline), share, _samples(chosen, said, result, shown))


def _score(chosen: Chosen, said: Sequence[Said]) -> Result:
    given = [_answer(question, one) for question, one in zip(chosen.questions, said, strict=True) if not one.error]
    return score.judged(chosen.benchmark, chosen.place, given, None, Path())


def _answer(question: Question, said: Said) -> Answer:
    row = {"question_id": question.id, "prompt": question.text, "text": said.text, **question.row}
    return Answer(id=question.id, prompt=question.text, text=said.text, row=row)


def _samples(chosen: Chosen, said: Sequence[Said], result: Result, shown: int) -> list[dict[str, Any]]:
    """The same questions at every evaluation."""
    items = {(str(one["question_id"]), one["question"]): one for one in result.items}
    found = []
    for question, one in spread(list(zip(chosen.questions, said, strict=True)), shown) if shown else ():
        item = items.get(question.key, {})
        found.append(
            {
                "benchmark": chosen.name,
                "question_id": question.id,
                "image": question.images[0].path if question.images else "",
                "question": question.text,
                "answer": one.text,
                "truth": item.get("truth") or question.truth,
                "correct": item.get("correct"),
            }
        )
    return found
