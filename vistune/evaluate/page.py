"""The page of an evaluation: figures that say what they are of, tables, and answers with their pictures.

Shows what it is handed; knows no benchmark's rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune import pages
from vistune.evaluate.published import PUBLISHED
from vistune.evaluate.score import judge_in_words, unscored
from vistune.images import ImageError, open_image
from vistune.pages.words import count, figure
from vistune.samples import Image

MOST, RIGHT = 60, 12
"""Answers of a benchmark on the page, and of these right ones while there are enough of the others."""
REMARKS = 12
"""Of what was odd, how many are named; all of them are in scores.json."""
_TEMPLATE = Path(__file__).parent / "pages" / "evaluate.html"
_SIDE = 208  # pixels of a picture
_LONG = 90  # characters from which a detail gets a line of its own
_KNOWN = ("question_id", "category", "question", "answer", "truth", "correct", "score")
_QUIET = ("row", "index", "parsed_question", "ground_truth", "l2_category", "metric")
"""What is said elsewhere on the card, or says nothing to people."""
_WORDS = {"content": "judge", "normalised_pred": "normalised", "tuple": "judge's scores"}
_SCALES = (1.0, 100.0, 200.0)
"""What the figures of a column are out of: the smallest of these that holds most of them, and else their largest. What
is above it (a sum of the others) has no bar."""


@dataclass(frozen=True)
class Card:
    """One answer. `kind`: wrong, right, or judged where nothing is either; `pictures`: (data URI, why there is none);
    `details`: (what, value, long)."""

    item: Mapping[str, Any]
    kind: str
    pictures: list[tuple[str, str]]
    details: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class Cell:
    """`share` of the column's scale, in percent; None where it has no bar."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Section:
    """One benchmark. `verdict`: whole, partial, subset or elsewhere; `why` says it in words."""

    name: str
    about: Mapping[str, Any]
    verdict: str
    why: str
    figure: str
    tables: list[tuple[str, list[str], list[list[Cell]]]]
    cards: list[Card]
    counts: dict[str, int]
    remarks: list[tuple[str, int, list[str]]]
    published: tuple[float, float] | None
    judge: str = ""

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(str(card.item.get("category") or "") for card in self.cards))


def write(
    out: Path,
    found: dict[str, Any],
    results: dict[str, list[dict[str, Any]]],
    pictures: dict[str, dict[str, list[Image]]],
) -> Path:
    """Write OUT/index.html. `found`: what scores.json holds; `results`: items by benchmark; `pictures`: images by
    benchmark and question_id."""
    sections = [
        section(name, about, results.get(name, []), pictures.get(name, {}))
        for name, about in found["benchmarks"].items()
    ]
    return pages.write(Path(out) / "index.html", _TEMPLATE, found=found, sections=sections, facts=_facts(found))


def section(
    name: str, about: Mapping[str, Any], items: Sequence[Mapping[str, Any]], pictures: Mapping[str, Sequence[Image]]
) -> Section:
    """All that the page says of one benchmark. `about`: its scores.json."""
    verdict, why, shown = _verdict(about)
    kinds = [kind_of(one) for one in items]
    return Section(
        name=name,
        about=about,
        verdict=verdict,
        why=why,
        figure=shown,
        tables=[(title, *_table(rows)) for title, rows in about.get("tables", {}).items() if rows],
        cards=[_card(one, pictures.get(str(one.get("question_id")), ())) for one in chosen(items)],
        counts={kind: kinds.count(kind) for kind in ("wrong", "right", "judged", "unanswered") if kind in kinds},
        remarks=[(kind, len(names), list(names[:REMARKS])) for kind, names in about.get("remarks", {}).items()],
        published=PUBLISHED.get(name),
        judge=judge_in_words(about["judge"]) if about.get("judge") else "",
    )


def kind_of(item: Mapping[str, Any]) -> str:
    """wrong, right, judged, or unanswered."""
    if item.get("answer") is None:
        return "unanswered"
    correct = item.get("correct")
    return "judged" if correct is None else "right" if correct else "wrong"


def chosen(items: Sequence[Mapping[str, Any]], most: int = MOST, right: int = RIGHT) -> list[Mapping[str, Any]]:
    """At most `most` answered items: those that are wrong or judged first, each kind spread over the categories."""
    good = [one for one in items if kind_of(one) == "right"]
    rest = [one for one in items if kind_of(one) in ("wrong", "judged")]
    shown = spread(rest, max(most - right, most - len(good)))
    return shown + spread(good, min(right, most - len(shown)))


def spread(items: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """`most` of them, evenly over the categories and within each; in their order."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(items):
        groups.setdefault(str(one.get("category") or ""), []).append(i)
    quotas, left = dict.fromkeys(groups, 0), min(most, len(items))
    while left:  # a turn gives every category that has more left one
        for name, places in groups.items():
            if left and quotas[name] < len(places):
                quotas[name], left = quotas[name] + 1, left - 1
    kept = [places[k * len(places) // quotas[name]] for name, places in groups.items() for k in range(quotas[name])]
    return [items[i] for i in sorted(kept)]


def _verdict(about: Mapping[str, Any]) -> tuple[str, str, str]:
    """What kind of figure it is, in words what it is of, and the figure (what is no score of the benchmark is none)."""
    value = about.get("scores", {}).get(about.get("headline"))
    done = "answered and judged" if about.get("judge") else "answered"
    share = f"{count(about['answered'])} of {count(about['questions'])} questions {done} ({about['share']:.1%})"
    if value is None:
        return "elsewhere", unscored(dict(about)) + (f"; {share}" if about["partial"] else ""), "–"
    if about["partial"]:
        return "partial", f"{_points(value)} over {share}: not the benchmark's score", "partial"
    if about.get("subset"):
        whole = f"{count(about['questions'])} of the published {count(about['published_questions'])} questions"
        return "subset", f"{_points(value)} over {whole}: not the benchmark's score", "subset"
    return "whole", f"{about['headline'].replace('_', ' ')}, {count(about['questions'])} questions", _points(value)


def _points(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 1 or not value else f"{value:.3f}"


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Columns and cells; the first column of figures has bars."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = {column: [row.get(column) for row in rows] for column in columns}
    first = next((column for column in columns if any(isinstance(one, float) for one in values[column])), None)
    scale = _scale([one for one in values.get(first or "", []) if isinstance(one, float)])
    return columns, [[_cell(row.get(column), scale if column == first else None) for column in columns] for row in rows]


def _scale(values: Sequence[float]) -> float:
    holds = [scale for scale in _SCALES if sum(abs(one) <= scale for one in values) > 0.7 * len(values)]
    return holds[0] if holds else max(map(abs, values), default=1.0)


def _cell(value: Any, scale: float | None) -> Cell:
    if not isinstance(value, float):
        return Cell(figure(value))
    text = f"{value:,.2f}" if abs(value) >= 1 or not value else f"{value:.4f}"
    return Cell(text, round(100 * abs(value) / scale, 2) if scale and abs(value) <= scale else None)


def _card(item: Mapping[str, Any], images: Sequence[Image]) -> Card:
    return Card(item, kind_of(item), [_picture(image) for image in images], list(_details(item)))


def _picture(image: Image) -> tuple[str, str]:
    try:
        return pages.data_uri(open_image(image), _SIDE), ""
    except (ImageError, OSError) as error:
        return "", f"cannot be read: {error}"


def _details(item: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """How the answer was read and what was said about it, beside what every item has."""
    if isinstance(score := item.get("score"), int | float) and float(score) != item.get("correct"):
        yield "score", figure(score), False
    for key, value in item.items():
        if key in _KNOWN + _QUIET or value is None or isinstance(value, bool | Mapping):
            continue
        texts = value if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else [value]
        for text in (", ".join(map(str, one)) if isinstance(one, list) else figure(one) for one in texts):
            if text and text != item.get("answer"):
                yield _WORDS.get(key, key.replace("_", " ")), text, len(text) > _LONG


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the figures depend on beside the model."""
    judges = dict.fromkeys(one["judge"]["model"] for one in found["benchmarks"].values() if one.get("judge"))
    facts = [
        ("precision", found.get("precision")),
        ("quantised", found.get("quantize")),
        ("template", found.get("template")),
        ("questions at once", found.get("batch")),
        ("processes", found.get("processes")),
        ("judge", ", ".join(judges)),
        ("answers a second", figure(found.get("answers_per_s"), 3) if found.get("answers_per_s") else ""),
        ("near ties", _ties(found)),
        ("weights", str(found.get("weights") or "")[:16]),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _ties(found: Mapping[str, Any]) -> str:
    if found.get("near_ties") is None:
        return ""
    return f"{count(found['near_ties'])} answers whose two best tokens were all but level at some step"
