"""Benchmarks in the midst of training: which questions are asked, and what the answers score.

Files are read, and the rule of scoring is tried, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistune import console
from vistune.evaluate import official, score
from vistune.evaluate.answering import Said
from vistune.evaluate.benchmarks import Benchmark, named
from vistune.evaluate.items import Answer, Question, Result, limited, spread
from vistune.evaluate.official import Place
from vistune.recipe import Evaluate


@dataclass(frozen=True)
class Chosen:
    """A benchmark of `total` questions, and those of them that are asked; an answer has `tokens` at most. `scores` are
    the names of its figures, none where nothing on this machine can score it."""

    benchmark: Benchmark
    place: Place
    questions: list[Question]
    total: int
    tokens: int
    scores: tuple[str, ...] = ()

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
    asked = [questions[at] for at in limited(questions, limit)]
    chosen = Chosen(benchmark, place, asked, len(questions), benchmark.tokens(place))
    result = _score(chosen, [Said(text="") for _ in asked])
    if not result.scores:
        why = "a judge scores it" if benchmark.judged else benchmark.server or "its answers are not published"
        console.warn(f"evaluate.benchmarks: {benchmark.name} has no score here ({why}); answers are shown alone")
    return replace(chosen, scores=tuple(result.scores))


def scored(chosen: Chosen, said: Sequence[Said], shown: int) -> Scored:
    """What the answers score by the official rule, and `shown` of them for people. ValueError as the rule has it."""
    result = _score(chosen, said)
    share = sum(not one.error for one in said) / chosen.total
    if result.questions:
        share = min(share, result.answered / result.questions)
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
    for at in spread(len(said), shown) if shown else ():
        question, one = chosen.questions[at], said[at]
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
