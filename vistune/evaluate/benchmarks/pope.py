"""POPE: is there such a thing in the picture, yes or no. Asks and scores as LLaVA does, the answers' order included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vistune.evaluate import official
from vistune.evaluate.benchmarks import SHORT, Benchmark
from vistune.evaluate.items import Answer, Question, Result, item
from vistune.evaluate.official import Place, field

LLAVA = "llava_pope_test.jsonl"
LABELS = "coco_pope_{}.json"
PICTURES = ("val2014",)

FIRST_IDS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Categories in the order of LLaVA's question file, and what it adds to the ids of their labels, which begin at 1."""


class Pope(Benchmark):
    """POPE on COCO: three categories of questions, whose things that are not there are more and less likely.

    Files, in the folder or below it:
        coco/coco_pope_{random,popular,adversarial}.json   JSON lines {question_id, image, text, label}
        llava_pope_test.jsonl      {question_id, image, text, category}; built from the labels where it is absent
        val2014/COCO_val2014_000000310196.jpg
    The labels that LLaVA's question file fits are those of POPE at commit e3e3926: 2,910 random ones, not 3,000.
    Prompt: the question and `SHORT`.
    Score: an answer is no if "No", "no" or "not" is a word of its first sentence, else yes. Accuracy, precision,
    recall, F1 and the share of yes (0 to 1) for each category; `f1`, the published figure, is the mean of the three
    F1 in percent. The n-th answer of a category is held against its n-th label, whatever its id: where that is not
    the question's own label, a remark says so. An answer whose row has `label_number`, as an evaluation writes it, is
    held against that label, so that some of the questions can be asked.
    """

    name = "pope"
    title = "POPE"
    folders = ("pope",)
    published = 8_910

    def questions(self, place: Place) -> list[Question]:
        return [one.question for one in _read(place).asked]

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        files = _read(place)
        known = {str(one.question.id): one for one in files.asked}
        given: dict[str, list[tuple[Asked, Answer]]] = {category: [] for category in files.labels}
        remarks: dict[str, list[str]] = defaultdict(list)
        seen: set[str] = set()
        for answer in answers:
            if (asked := known.get(str(answer.id))) is None:
                remarks["foreign"].append(str(answer.id))
                continue
            if str(answer.id) in seen:
                remarks["duplicate"].append(str(answer.id))
            seen.add(str(answer.id))
            given[asked.question.category].append((asked, answer))
        items = [one for category, pairs in given.items() for one in _items(pairs, files.labels[category], remarks)]
        missing = [one for one in files.asked if str(one.question.id) not in seen]
        remarks["missing"] += [str(one.question.id) for one in missing]
        remarks["labels that do not fit the questions"] += files.unfit
        tables = [_rates(category, [one for one in items if one["category"] == category]) for category in given]
        items += [item(one.question, None, None, parsed=None, label=one.question.truth) for one in missing]
        order = {id: number for number, id in enumerate(known)}
        return Result(
            scores=_scores(tables),
            headline="f1",
            questions=len(known),
            answered=len(seen),
            tables={"categories": tables},
            items=sorted(items, key=lambda one: order[str(one["question_id"])]),
            remarks={kind: ids for kind, ids in remarks.items() if ids},
        )


@dataclass(frozen=True)
class Asked:
    """A question and which one of its category it is, from 1."""

    question: Question
    number: int


@dataclass(frozen=True)
class Files:
    """What the official files say: questions, rows of labels by category, and where the two do not fit."""

    asked: list[Asked]
    labels: dict[str, list[dict[str, Any]]]
    unfit: list[str]


def yes_or_no(text: str) -> str:
    """Only what stands between spaces is a word: "no" is one, and "(no)" and "NO" are none."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _items(
    pairs: Sequence[tuple[Asked, Answer]], labels: Sequence[dict[str, Any]], remarks: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """One item for each answer of a category, in their order; those beyond the last label have none."""
    found, texts = [], {asked.question.text for asked, _ in pairs}
    for place, (asked, answer) in enumerate(pairs):
        written = answer.row.get("label_number")
        number = written if isinstance(written, int) else place + 1
        row = labels[number - 1] if 0 < number <= len(labels) else {}
        label = ("no" if row["label"] == "no" else "yes") if row else None
        if number != asked.number or (answer.prompt in texts and answer.prompt != asked.question.text):
            remarks["held against the label of another question"].append(str(answer.id))
        parsed = yes_or_no(answer.text)
        correct = None if label is None else parsed == label
        found.append(item(asked.question, answer.text, correct, parsed=parsed, label=label))
    return found


def _rates(category: str, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A category's row, as LLaVA's eval_pope.py prints it; a rate of nothing is 0."""
    said = [(one["parsed"], one["label"]) for one in items]
    tp, fp = said.count(("yes", "yes")), said.count(("yes", "no"))
    tn, fn = said.count(("no", "no")), said.count(("no", "yes"))
    precision, recall = _share(tp, tp + fp), _share(tp, tp + fn)
    return {
        "category": category,
        "samples": len(items),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": _share(tp + tn, tp + fp + tn + fn),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(sum(parsed == "yes" for parsed, _ in said), len(said)),
    }


RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    each = {f"{row['category']}_{rate}": row[rate] for row in rows for rate in RATES}
    return {"f1": 100 * _share(sum(row["f1"] for row in rows), len(rows)), **each}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _read(place: Place) -> Files:
    """ValueError for a category without its file of labels, and for a row that lacks something."""
    path = place.find(LLAVA)
    rows = official.question_rows(path, "image", "category") if path else _built(place)
    labels = {category: _labels(place, category) for category in dict.fromkeys(row["category"] for row in rows)}
    counts = dict.fromkeys(labels, 0)
    asked, unfit = [], []
    for row in rows:
        category = row["category"]
        own = labels[category][counts[category]] if counts[category] < len(labels[category]) else {}
        counts[category] += 1
        if own.get("text", "") not in row["text"] or own.get("image", row["image"]) != row["image"]:
            unfit.append(f"{row['question_id']} ({category} {counts[category]})")
        question = Question(
            id=row["question_id"],
            text=row["text"],
            images=(place.picture(row["image"], *PICTURES),),
            category=category,
            truth=own.get("label", ""),
            row={"label_number": counts[category]},
        )
        asked.append(Asked(question, counts[category]))
    return Files(asked, labels, [*_uneven(labels, counts), *unfit])


def _uneven(labels: dict[str, list[dict[str, Any]]], counts: dict[str, int]) -> Iterable[str]:
    for category, count in counts.items():
        if len(labels[category]) != count:
            yield f"{LABELS.format(category)} has {len(labels[category])} for {count} questions"


def _built(place: Place) -> list[dict[str, Any]]:
    """The rows of LLaVA's question file, from the labels of the categories that are there."""
    found = [category for category in FIRST_IDS if place.find(LABELS.format(category))]
    if not found:
        place.file(LLAVA, *map(LABELS.format, FIRST_IDS))
    return [
        {**row, "question_id": FIRST_IDS[category] + number, "text": row["text"] + SHORT, "category": category}
        for category in found
        for number, row in enumerate(_labels(place, category, "text", "image"), 1)
    ]


def _labels(place: Place, category: str, *keys: str) -> list[dict[str, Any]]:
    path = place.file(f"coco/{LABELS.format(category)}", LABELS.format(category))
    rows = official.json_lines(path)
    for number, row in enumerate(rows, 1):
        for key in ("label", *keys):
            field(row, key, path, number)
    return rows
