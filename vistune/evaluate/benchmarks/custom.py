"""A user's own questions: LLaVA's question format, right answers beside it, and one of six ways to compare them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vistune.evaluate import official, scoring
from vistune.evaluate.benchmarks import Benchmark
from vistune.evaluate.items import Answer, Question, Result, item, match, percent
from vistune.evaluate.official import Place

HALF = 0.5
"""From this score on an answer is shown among the right ones."""

Compare = Callable[[str, Sequence[str], Sequence[str]], float]
"""An answer, what is right, and the options: 0..1."""


def contains(answer: str, truth: str) -> float:
    """1 where the truth is a part of the answer, whatever the case and the blanks."""
    whole, part = (" ".join(text.lower().split()) for text in (answer, truth))
    return float(bool(part) and part in whole)


def _best(compare: Callable[[str, str], float]) -> Compare:
    return lambda answer, truths, options: max(compare(answer, truth) for truth in truths)


METRICS: dict[str, Compare] = {
    "exact": _best(scoring.exact),
    "option": lambda answer, truths, options: max(scoring.option(answer, truth, options) for truth in truths),
    "yes_no": _best(scoring.yes_no),
    "vqa": lambda answer, truths, options: scoring.vqa(answer, truths),
    "anls": lambda answer, truths, options: scoring.anls(answer, truths),
    "contains": _best(contains),
}


WANTED = {str: "a text", int: "a whole number above 0"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What benchmark.toml may say."""

    title: str = "custom"
    metric: str = ""
    images: str = ""
    suffix: str = ""
    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, how its answer is compared, and with what."""

    question: Question
    metric: str
    truths: tuple[str, ...]
    options: tuple[str, ...]


class Custom(Benchmark):
    """Files: a folder with `questions.jsonl` (or one `*questions*.jsonl`), a question a line:

        {"question_id": 1, "image": "a.jpg", "text": "Which one?\\nA. cat\\nB. dog", "options": ["cat", "dog"],
         "answer": "B", "category": "animals", "metric": "option"}

    `image` is a name or a list of them, or `images` is; without them it is a question about text alone. What is right
    is `answer`, or `answers` (several people's, or several that are right), here or by question_id in `answers.jsonl`;
    a question without is asked and not scored. Pictures lie in `images/`, or beside the file, or where it is said.

    `benchmark.toml`, if it is there:

        title = "My questions"      metric = "vqa"        images = "pictures"
        suffix = "Answer with one word."                  max_new_tokens = 16

    Prompt: `text` as it is, with its options if they are to be seen; `suffix` on a line of its own after it.

    Rule, the question's `metric`, or the file's, or `option` where there are options, else `exact`:
    exact: equal but for case, blanks around and full stops at the end. option: the letter or the text of the right one.
    yes_no: the first of yes and no. vqa: VQA accuracy over all the answers, normalised. anls: similarity of letters, 0
    below one half. contains: what is right is a part of the answer. Of several right ones the nearest counts (vqa
    apart). Figures are means in percent, of one metric under its name; of several each, and `mean` over all questions.
    """

    name = "custom"
    title = "custom"
    folders = ("custom",)
    protocol = "custom"

    def questions(self, place: Place) -> list[Question]:
        return [one.question for one in _read(place)[0]]

    def tokens(self, place: Place) -> int:
        return _settings(_file(place).parent).max_new_tokens

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        asked, remarks = _read(place)
        matched = match([one.question for one in asked], answers)
        items = [_scored(*pair, _file(place)) for pair in zip(asked, matched.answers, strict=True)]
        scored = [one for one in items if "score" in one]
        scores = _means(scored)
        title = _settings(_file(place).parent).title
        categories = list(dict.fromkeys(one["category"] for one in scored))
        rows = [_row(name, [one for one in scored if one["category"] == name]) for name in categories]
        return Result(
            scores=scores,
            headline=next(iter(scores), "mean") if len(scores) < 2 else "mean",
            questions=len(asked),
            answered=matched.answered,
            tables={f"{title}, by category": rows} if any(categories) else {},
            items=items,
            remarks=matched.remarks | remarks,
            title=title,
        )


def _scored(one: Asked, answer: Answer | None, path: Path) -> dict[str, Any]:
    if answer is None or not one.truths:
        return item(one.question, answer.text if answer else None, None, metric=one.metric)
    try:
        score = METRICS[one.metric](answer.text, one.truths, one.options)
    except ValueError as error:
        raise ValueError(f"{path}: question_id {one.question.id}: metric {one.metric}: {error}") from None
    return item(one.question, answer.text, score >= HALF, score, metric=one.metric)


def _means(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each metric's mean in percent, and where there are several the mean of all."""
    by: dict[str, list[float]] = {}
    for one in items:
        by.setdefault(one["metric"], []).append(one["score"])
    found = {metric: percent(sum(scores), len(scores)) for metric, scores in by.items()}
    return found if len(found) < 2 else found | {"mean": percent(sum(one["score"] for one in items), len(items))}


def _row(name: str, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"category": name, "answered": len(items)} | _means(items)


def _file(place: Place) -> Path:
    path = place.file("questions.jsonl", "*questions*.jsonl")
    others = sorted(path.parent.glob("*questions*.jsonl"))
    if path.name != "questions.jsonl" and len(others) > 1:
        raise ValueError(f"{path.parent}: {others[0].name} or {others[1].name}? Call the one questions.jsonl")
    return path


def _read(place: Place) -> tuple[list[Asked], dict[str, list[str]]]:
    """All questions with what is right, and what is odd about that."""
    path = _file(place)
    settings, rows = _settings(path.parent), official.json_lines(path)
    beside = path.parent / "answers.jsonl"
    alone = [row for row in rows if "answer" not in row and "answers" not in row]
    truths = dict(_truths_beside(beside)) if alone and beside.is_file() else {}
    here = replace(place, root=path.parent)
    reader = _Reader(path, here, settings, truths)
    asked = [reader.asked(number, row) for number, row in enumerate(rows, 1)]
    ids = {str(one.question.id) for one in asked}
    odd = {
        "without a right answer": [str(one.question.id) for one in asked if not one.truths],
        f"in {beside.name} for no question": [id for id in truths if id not in ids],
    }
    return asked, {kind: names for kind, names in odd.items() if names}


@dataclass(frozen=True)
class _Reader:
    path: Path
    place: Place
    settings: Settings
    truths: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def asked(self, number: int, row: dict[str, Any]) -> Asked:
        where = f"{self.path}:{number}"
        id, text = (official.field(row, key, self.path, number) for key in ("question_id", "text"))
        options = tuple(_words(row.get("options", []), f"{where}: options"))
        truths = _truths(row, where) if "answer" in row or "answers" in row else self.truths.get(str(id), ())
        question = Question(
            id=id,
            text=self._text(str(text)),
            images=tuple(self.place.picture(name, *self._folders()) for name in _pictures(row, where)),
            category=str(row.get("category", "")),
            truth=" | ".join(dict.fromkeys(truths)),
        )
        metric = row.get("metric") or self.settings.metric or ("option" if options else "exact")
        return Asked(question=question, metric=_metric(metric, where), truths=truths, options=options)

    def _text(self, text: str) -> str:
        suffix = self.settings.suffix.strip("\n")
        return f"{text}\n{suffix}" if suffix and not text.endswith(suffix) else text

    def _folders(self) -> list[str]:
        return [self.settings.images] if self.settings.images else ["images", "."]


def _pictures(row: dict[str, Any], where: str) -> list[str]:
    given = row.get("images") or row.get("image") or []
    names = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: image {given!r}: names of pictures are wanted")
    return names


def _truths(row: dict[str, Any], where: str) -> tuple[str, ...]:
    given = row["answers"] if "answers" in row else [row["answer"]]
    return tuple(_words(given, f"{where}: answers"))


def _words(given: Any, where: str) -> Iterator[str]:
    """Texts of a list of texts, numbers, true and false, or objects that have one under `answer` (VQA's people)."""
    if not isinstance(given, list):
        raise ValueError(f"{where}: {given!r}: a list is wanted")
    for one in given:
        word = one.get("answer") if isinstance(one, dict) else one
        if not isinstance(word, str | int | float):
            raise ValueError(f"{where}: {one!r} is no text")
        yield {True: "yes", False: "no"}[word] if isinstance(word, bool) else str(word)


def _truths_beside(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """By question_id. ValueError for an id that comes twice."""
    seen = set()
    for number, row in enumerate(official.json_lines(path), 1):
        id = str(official.field(row, "question_id", path, number))
        if "answers" not in row:
            official.field(row, "answer", path, number)
        if id in seen:
            raise ValueError(f"{path}:{number}: question_id {id} comes a second time; keep one")
        seen.add(id)
        yield id, _truths(row, f"{path}:{number}")


def _metric(name: Any, where: str) -> str:
    if str(name) not in METRICS:
        raise ValueError(f"{where}: metric {name!r} is unknown; choose {', '.join(METRICS)}")
    return str(name)


def _settings(folder: Path) -> Settings:
    """What benchmark.toml says, if it is there. ValueError for what it cannot say."""
    path = folder / "benchmark.toml"
    if not path.is_file():
        return Settings()
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    known = {one.name: int if isinstance(one.default, int) else str for one in fields(Settings)}
    for key, value in said.items():
        if key not in known:
            raise ValueError(f"{path}: {key} is unknown; it may have {', '.join(known)}")
        if type(value) is not known[key] or (isinstance(value, int) and value < 1):
            raise ValueError(f"{path}: {key} = {value!r}: {WANTED[known[key]]} is wanted")
    settings = Settings(**said)
    if settings.metric:
        _metric(settings.metric, str(path))
    if settings.images and not (folder / settings.images).is_dir():
        raise ValueError(f"{path}: images = {settings.images!r}: {folder / settings.images} is no folder")
    return settings
