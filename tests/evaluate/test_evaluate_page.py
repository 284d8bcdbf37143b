"""The page of an evaluation: what is no score is not shown as one, data is never markup, nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pictures

from tests.parsed import Page
from vistune.evaluate import page
from vistune.evaluate.items import Question, Result, item
from vistune.evaluate.published import PUBLISHED
from vistune.samples import Image

JUDGE = {
    "model": "judge-7",
    "url": "http://127.0.0.1:9/v1",
    "answered_as": ["judge-7-0613"],
    "first": "2026-11-20",
    "last": "2026-11-21",
    "replies": 8,
    "cached": 2,
    "failed": 1,
}
EVIL = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;{{ 7 * 7 }}"


def about(result: Result, **more: Any) -> dict[str, Any]:
    """What scores.json says of it."""
    whole = not result.partial
    return {
        "benchmark": "pope",
        "title": "POPE",
        "protocol": "llava-official",
        "score": result.scores.get(result.headline) if whole else None,
        "headline": result.headline,
        "partial": result.partial,
        "questions": result.questions,
        "answered": result.answered,
        "share": result.answered / result.questions,
        "published_questions": None,
        "subset": False,
        "scores": result.scores,
        "tables": result.tables,
        "remarks": result.remarks,
        "submission": [],
        "scored_elsewhere": "",
        "judged": False,
    } | more


def made_items(count: int = 8, right: int = 3, categories: tuple[str, ...] = ("random", "popular")) -> list[dict]:
    questions = [
        Question(id=i, text=f"Is there a cup {i}?", category=categories[i % len(categories)], truth="yes")
        for i in range(count)
    ]
    return [item(one, "yes" if i < right else "no", i < right, parsed="no") for i, one in enumerate(questions)]


def written(out: Path, items: list[dict], pictures: dict | None = None, name: str = "pope", **more: Any) -> Page:
    result = Result(scores={"f1": 61.23, "accuracy": 0.55}, headline="f1", questions=len(items), answered=len(items))
    found = {
        "model": "runs/mine",
        "date": "2026-11-21T12:00:00+00:00",
        "vistune": "0.1.0",
        "precision": "bf16",
        "batch": 16,
        "near_ties": 2,
        "benchmarks": {name: about(result, **more)},
    }
    path = page.write(out, found, {name: items}, {name: pictures or {}})
    assert path == out / "index.html"
    return alone(path.read_text())


def alone(text: str) -> Page:
    """Parses, and fetches nothing: addresses within the page and pictures inside it alone."""
    read = Page(text)
    for tag, known in read.tags:
        assert known.get("src", "data:image/").startswith("data:image/"), (tag, known)
        assert known.get("href", "#").startswith("#") and "onerror" not in known
    assert len(read.of("script")) == 2
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", "".join(read.of("style") + read.of("script")))
    return read


def test_figures_with_what_they_depend_on(tmp_path: Path) -> None:
    tables = {"by category": [{"category": "random", "f1": 88.25, "questions": 4}]}
    read = written(tmp_path, made_items(), tables=tables, judge=JUDGE)
    (tile,) = [text for tag, known, text in read.texts if tag == "a" and "tile" in known.get("class", "")]
    assert "POPE" in tile and "61.2" in tile
    seen = " ".join(read.of("facts") + read.of("about"))
    for said in ("bf16", "llava-official", "judge-7-0613", "2026-11-21", "1 failed", "2 answers whose two best tokens"):
        assert said in seen, said
    assert str(PUBLISHED["pope"][0]) in read.of("overview")[0] and "published" in read.of("overview")[0]
    widths = [known["style"] for tag, known in read.tags if tag == "i" and known.get("style", "").startswith("width")]
    assert widths == ["width:88.25%"] and "88.25" in read.of("tables")[0]
    assert [len(read.of(kind)) for kind in ("wrong", "right")] == [5, 3]
    assert not read.of("stamp") and not read.of("not")


@pytest.mark.parametrize(
    ("more", "word", "share"),
    [
        (
            {"partial": True, "score": None, "answered": 5, "share": 5 / 8},
            "partial",
            "5 of 8 questions answered (62.5%)",
        ),
        ({"subset": True, "published_questions": 8910}, "subset", "8 of the published 8,910 questions"),
    ],
)
def test_what_is_no_score_cannot_be_taken_for_one(tmp_path: Path, more: dict, word: str, share: str) -> None:
    """The tile's figure is the word itself, the overview has no number, and the section says why."""
    read = written(tmp_path, made_items(), **more)
    (tile,) = [text for tag, known, text in read.texts if tag == "a" and "tile" in known.get("class", "")]
    assert share in tile and "not the benchmark's score" in tile
    assert read.of("b")[0] == word
    assert "61.2" not in read.of("overview")[0] and read.of("stamp") == [word, word]
    assert read.of("not")[0].startswith(word.upper()) and all(word in one for one in read.of("headline"))


def test_no_score_where_none_is_published(tmp_path: Path) -> None:
    read = written(
        tmp_path, made_items(), scores={}, score=None, scored_elsewhere="EvalAI", submission=["up/load.json"]
    )
    assert read.of("b")[0] == "–" and "no answers are published, EvalAI scores it" in read.of("about")[1]
    assert "for EvalAI: up/load.json" in read.of("odd")[0]


def test_everything_of_the_data_is_text(tmp_path: Path) -> None:
    question = Question(id=EVIL, text=EVIL, category=EVIL, truth=EVIL)
    items = [item(question, EVIL, False, parsed=EVIL, content=[f"Why: {EVIL}"])]
    tables = {EVIL: [{EVIL: EVIL, "f1": 1.5}]}
    read = written(tmp_path, items, tables=tables, remarks={EVIL: [EVIL]}, title=EVIL, protocol=EVIL)
    assert read.of("question") == [EVIL] and read.of("given") == [EVIL]
    assert f"Why: {EVIL}" in read.of("dd") and EVIL in read.of("tables")[0] and EVIL in read.of("odd")[0]
    assert not [tag for tag, known in read.tags if tag == "img"]


def test_pictures_lie_inside_and_those_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good, torn = tmp_path / "good.png", tmp_path / "torn.png"
    Pictures.effect_noise((900, 700), 60).convert("RGB").save(good)
    torn.write_bytes(good.read_bytes()[:500])
    images = {"0": [Image(path=str(good))], "1": [Image(path=str(torn))], "2": [Image(path="gone.png")]}
    read = written(tmp_path / "out", made_items(3, 0), images)
    (uri,) = [known["src"] for tag, known in read.tags if tag == "img"]
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 40_000
    assert [name for name in ("torn.png", "gone.png") if any(name in one for one in read.of("none"))] == [
        "torn.png",
        "gone.png",
    ]


def test_at_most_so_many_spread_over_the_categories(tmp_path: Path) -> None:
    items = made_items(600, 200, ("a", "b", "c", "d"))
    items += [item(Question(id=f"rare {i}", text="?", category="rare"), "no", False) for i in range(3)]
    items += [item(Question(id="mute", text="?", category="rare"), None, None)]
    chosen = page.chosen(items)
    wrong = [one for one in chosen if one["correct"] is False]
    assert len(chosen) == page.MOST and len(wrong) == page.MOST - page.RIGHT
    each = [sum(one["category"] == name for one in wrong) for name in ("a", "b", "c", "d", "rare")]
    assert each[4] == 3 and max(each[:4]) - min(each[:4]) <= 1
    assert wrong[0]["question_id"] < 210 and wrong[-4]["question_id"] > 540
    assert not [one for one in chosen if one["question_id"] == "mute"]
    read = written(tmp_path, items)
    assert "403 wrong, 200 right, 1 unanswered" in " ".join(read.of("small"))


def test_a_judge_s_words_are_shown(tmp_path: Path) -> None:
    question = Question(id=4, text="Describe it.", category="complex")
    words = "Assistant 2 is more precise about the boat, and tells what lies in it; " * 2
    read = written(
        tmp_path, [item(question, "A boat.", None, 7.0, content=words, tuple=[8.0, 7.0])], name="llava_bench"
    )
    assert [text for tag, known, text in read.texts if tag == "dd" and known.get("class") == "long"] == [words]
    assert "8.0, 7.0" in read.of("dd") and read.of("judged")
