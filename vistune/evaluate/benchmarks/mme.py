"""MME: two yes-or-no questions about each picture, fourteen subtasks, scored with and without the pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistune.evaluate import official
from vistune.evaluate.benchmarks import SHORT, Benchmark
from vistune.evaluate.items import Answer, Matched, Question, Result, item, match, percent
from vistune.evaluate.official import Place
from vistune.samples import Image

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SIDES = {"perception": PERCEPTION, "cognition": COGNITION}
CATEGORIES = PERCEPTION + COGNITION

TEXTS = "questions_answers_YN"
"""The folder of the texts in the categories that have their pictures in another."""

RELEASE = "MME_Benchmark_release_version"
YES_NO = "Please answer yes or no."
PICTURES = (".jpg", ".png", ".jpeg")

OFFICIAL, LMMS_EVAL = "parsed_official", "parsed_lmms_eval"
TABLES = {OFFICIAL: "MME, calculation.py (what LLaVA publishes)", LMMS_EVAL: "MME, scored as lmms-eval scores it"}

Topic = tuple[str, str]
"""A picture: its category and the name of its file without folders and ending."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the release: the picture's text file, the question as it stands there, and what is right."""

    topic: Topic
    file: Path
    question: str
    truth: str


class MME(Benchmark):
    """Files: `llava_mme.jsonl` (question_id, image, text, category), asked as it is, and beside it the release,

        MME_Benchmark_release_version/existence/000000006040.{jpg,txt}
        MME_Benchmark_release_version/posters/{images/tt0048028.jpg, questions_answers_YN/tt0048028.txt}

    whose texts hold `QUESTION Please answer yes or no.<tab>Yes` twice. They hold the answers, so a score needs them;
    without `llava_mme.jsonl` the questions are made from them.

    Prompt: the question, its " Please answer yes or no." (one space or two before it) replaced by a new line and
    "Answer the question using a single word or phrase.". Both questions of a picture have its id, so an answer finds
    its question by id and text, whichever of the two endings it was asked with.

    Rule (calculation.py): the answer in lower case is yes or no if it is that, else yes if "yes" is in its first four
    characters, else no if "no" is, else neither. A category scores the percentage of right answers plus that of
    pictures with both right, 200 at most; perception is the sum of ten categories (published), cognition of four.
    Beside it stands the score by lmms-eval's parser, which also takes off blanks at the ends and every full stop, and
    knows "y" and "n"; it is never quoted as the benchmark's.

    What is not answered is left out of every percentage, and a picture with one answer of its two has no part in the
    pairs (with no pair whole, their percentage is 0). A tab or line end within an answer would break the official
    result file; it is written as a blank, which no parser sees (`parsed_official` is null there).
    """

    name = "mme"
    title = "MME"
    also = ("mme_perception", "mmeperception")
    folders = ("MME", "mme")
    published = 2374

    def questions(self, place: Place) -> list[Question]:
        path = place.find("llava_mme.jsonl")
        asked = _listed(place, path) if path else _made(place, _release(place))
        _check_pairs([_topic(question.id) for question in asked], path or place.root)
        return asked

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        asked, entries, matched = _told(place, self.questions(place), answers)
        items = [_scored(*told) for told in zip(asked, entries, matched.answers, strict=True)]
        topics = [entry.topic for entry in entries]
        rows = {parser: _categories(items, topics, parser) for parser in TABLES}
        if carried := [str(one["question_id"]) for one in items if one["answer"] and not _fits(one["answer"])]:
            matched.remarks["tab or line end in the answer"] = carried
        return Result(
            scores={row["category"]: row["score"] for row in _with_sums(rows[OFFICIAL])},
            headline="perception",
            questions=len(asked),
            answered=matched.answered,
            tables={TABLES[parser]: _with_sums(found) for parser, found in rows.items()},
            items=items,
            remarks=matched.remarks,
        )

    def submission(self, place: Place, answers: Sequence[Answer], out: Path) -> list[Path]:
        """`results/CATEGORY.txt` for calculation.py: picture's file, question, truth and answer, with tabs between."""
        _, entries, matched = _told(place, self.questions(place), answers)
        lines: dict[str, list[str]] = {}
        for entry, answer in zip(entries, matched.answers, strict=True):
            category, stem = entry.topic
            if answer is None:
                raise ValueError(f"MME: {category}/{stem}: {entry.question!r} has no answer; calculation.py wants all")
            told = (f"{stem}.txt", entry.question, entry.truth, _one_line(answer.text))
            lines.setdefault(category, []).append("\t".join(told) + "\n")
        return [official.write(out / "results" / f"{name}.txt", "".join(rows)) for name, rows in lines.items()]


def parse_official(text: str) -> str:
    """yes, no or other by calculation.py: of the raw text, so a blank in front costs a character."""
    return _first_four(text.lower())


def parse_lmms_eval(text: str) -> str:
    """yes, no or other by lmms-eval."""
    plain = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(plain) or _first_four(plain)


def _first_four(text: str) -> str:
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


PARSERS: dict[str, Callable[[str], str]] = {OFFICIAL: parse_official, LMMS_EVAL: parse_lmms_eval}


def _fits(text: str) -> bool:
    return _one_line(text) == text


def _one_line(text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, "\t\n\r"), " "))


def _scored(question: Question, entry: Entry, answer: Answer | None) -> dict[str, Any]:
    """The item of one question; `correct` by the official parser."""
    question = replace(question, category=entry.topic[0], truth=entry.truth)
    if answer is None:
        return item(question, None, None, **dict.fromkeys(PARSERS))
    parsed: dict[str, Any] = {name: parse(answer.text) for name, parse in PARSERS.items()}
    right = parsed[OFFICIAL] == entry.truth.lower()
    if not _fits(answer.text):
        parsed[OFFICIAL] = None
    return item(question, answer.text, right, **parsed)


def _categories(items: Sequence[dict[str, Any]], topics: Sequence[Topic], parser: str) -> list[dict[str, Any]]:
    """A row for each category that has an answer: accuracy, pictures with both right, and their sum."""
    right: dict[str, dict[str, list[bool]]] = {}
    for one, (category, stem) in zip(items, topics, strict=True):
        if one["answer"] is not None:
            word = PARSERS[parser](one["answer"])
            right.setdefault(category, {}).setdefault(stem, []).append(word == one["truth"].lower())
    return [_category(name, right[name]) for name in CATEGORIES if name in right]


def _category(name: str, pictures: dict[str, list[bool]]) -> dict[str, Any]:
    answered = [one for pair in pictures.values() for one in pair]
    whole = [all(pair) for pair in pictures.values() if len(pair) == 2]
    acc, acc_plus = percent(sum(answered), len(answered)), percent(sum(whole), len(whole))
    return {"category": name, "answered": len(answered), "acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}


def _with_sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sums of perception and cognition, and then the categories' rows."""
    sums = []
    for side, names in SIDES.items():
        of = [row for row in rows if row["category"] in names]
        if of:
            answered = sum(row["answered"] for row in of)
            sums.append({"category": side, "answered": answered, "score": sum(row["score"] for row in of)})
    return sums + rows


def _told(
    place: Place, asked: list[Question], answers: Sequence[Answer]
) -> tuple[list[Question], list[Entry], Matched]:
    """The questions, their entries in the release, and the answers to them. ValueError for one that is not there."""
    if mute := next((answer for answer in answers if not answer.prompt), None):
        raise ValueError(f"MME: an answer to {mute.id} has no prompt, which says to which of its two questions it is")
    release = _release(place)
    known = {(entry.topic, _bare(entry.question)): entry for entry in _entries(release)}
    keys = [(_topic(question.id), _bare(question.text)) for question in asked]
    for (topic, text), question in zip(keys, asked, strict=True):
        if (topic, text) not in known:
            raise ValueError(f"{release}: no answer to {text!r} of {question.id}; are the release and the file a pair?")
    plain = [replace(one, id="/".join(topic), text=text) for (topic, text), one in zip(keys, asked, strict=True)]
    given = [replace(answer, id="/".join(_topic(answer.id)), prompt=_bare(answer.prompt)) for answer in answers]
    return asked, [known[key] for key in keys], match(plain, given, by_text=True)


def _topic(id: object) -> Topic:
    """As the official conversion reads an id: the first folder, and the last part up to its first full stop."""
    parts = str(id).split("/")
    return parts[0], parts[-1].split(".")[0]


def _bare(text: str) -> str:
    """A question without the words that say how to answer, whichever they are."""
    return text.removeprefix("<image>").replace(SHORT.strip(), "").replace(YES_NO, "").strip()


def _listed(place: Place, path: Path) -> list[Question]:
    """The rows of LLaVA's question file."""
    release = _find_release(place)
    truths = {(entry.topic, _bare(entry.question)): entry.truth for entry in _entries(release)} if release else {}
    found = []
    for number, row in enumerate(official.json_lines(path), 1):
        id, text, picture = (str(official.field(row, key, path, number)) for key in ("question_id", "text", "image"))
        category = _topic(id)[0]
        if category not in CATEGORIES:
            raise ValueError(f"{path}:{number}: {id}: {category!r} is no category of MME; {', '.join(CATEGORIES)}")
        image, truth = place.picture(picture, str(release or RELEASE)), truths.get((_topic(id), _bare(text)), "")
        found.append(Question(id=id, text=text, images=(image,), category=category, truth=truth))
    return found


def _made(place: Place, release: Path) -> list[Question]:
    """The questions as LLaVA's file has them, from the release alone; the picture's name there is the id."""
    found = []
    for entry in _entries(release):
        category, stem = entry.topic
        below = f"{category}/images" if entry.file.parent.name == TEXTS else category
        pictures = (place.images or release) / below
        path = next((path for end in PICTURES if (path := pictures / f"{stem}{end}").exists()), pictures / stem)
        image, text = Image(path=str(path)), f"{_bare(entry.question)}{SHORT}"
        id = f"{below}/{path.name}"
        found.append(Question(id=id, text=text, images=(image,), category=category, truth=entry.truth))
    return found


def _check_pairs(topics: Sequence[Topic], where: Path) -> None:
    """ValueError for a picture that is not asked two questions."""
    counts: dict[Topic, int] = {}
    for topic in topics:
        counts[topic] = counts.get(topic, 0) + 1
    if odd := [(topic, count) for topic, count in counts.items() if count != 2]:
        (category, stem), count = odd[0]
        raise ValueError(f"{where}: {category}/{stem} is asked {count} questions; MME asks two of each picture")


def _release(place: Place) -> Path:
    """The folder that holds the categories' folders."""
    if (found := _find_release(place)) is None:
        raise ValueError(f"{place.root}: {RELEASE} is not there, and it holds the answers; see docs/evaluate.md")
    return found


def _find_release(place: Place) -> Path | None:
    for category in CATEGORIES:
        if (found := place.find(f"{RELEASE}/{category}/", f"{category}/")) is not None:
            return found.parent
    return None


def _entries(release: Path) -> Iterator[Entry]:
    """All lines of the release, by category and file."""
    for category in CATEGORIES:
        texts = release / category / TEXTS
        for file in sorted((texts if texts.is_dir() else release / category).glob("*.txt")):
            found = list(_lines(category, file))
            if len(found) != 2:
                raise ValueError(f"{file}: {len(found)} questions; MME asks two of each picture")
            yield from found


def _lines(category: str, file: Path) -> Iterator[Entry]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        question, tab, truth = line.strip().rpartition("\t")
        if not tab or truth.lower() not in ("yes", "no"):
            raise ValueError(f"{file}:{number}: {line[:80]!r} is no question, tab, and Yes or No; fetch it again")
        yield Entry((category, file.name.split(".")[0]), file, question, truth)
