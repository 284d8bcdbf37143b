"""A user's own questions: every metric by hand, files as people lay them, and what is wrong with them named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate.scored import answer, refused, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.custom import METRICS, contains
from vistune.evaluate.items import Question, Result

CUSTOM = named("custom")


def folder(at: Path, *rows: dict[str, object], toml: str = "", name: str = "questions.jsonl") -> Path:
    at.mkdir(parents=True, exist_ok=True)
    write_answers(at / name, list(rows))
    if toml:
        (at / "benchmark.toml").write_text(toml, encoding="utf-8")
    return at


def place(at: Path) -> official.Place:
    return official.place(at, CUSTOM.folders)


def asked(at: Path, *rows: dict[str, object], toml: str = "") -> list[Question]:
    return CUSTOM.questions(place(folder(at, *rows, toml=toml)))


def scored(at: Path, row: dict[str, object], text: str) -> float:
    """The score, 0..1, of one answer to one question."""
    plain = {"question_id": 1, "text": "Why?"}
    return CUSTOM.score(place(folder(at, plain | row)), [answer(1, text)]).items[0]["score"]


def result(at: Path, **texts: str) -> Result:
    return CUSTOM.score(place(at), [answer(id, text) for id, text in texts.items()])


PEOPLE = ["two", "2", "two dogs", *["three"] * 7]


@pytest.mark.parametrize(
    ("row", "text", "score"),
    [
        ({"answer": "A cat"}, " a cat. ", 1),
        ({"answer": "A cat"}, "cat", 0),
        ({"answer": 3}, "3", 1),
        ({"answer": True, "metric": "yes_no"}, "Yes, there is.", 1),
        ({"answer": False, "metric": "yes_no"}, "Yes, there is.", 0),
        ({"answer": "no", "metric": "yes_no"}, "I do not see one", 1),
        ({"answer": "B", "options": ["cat", "dog"]}, "(B)", 1),
        ({"answer": "dog", "options": ["cat", "dog"]}, "The answer is B.", 1),
        ({"answer": "B", "options": ["cat", "dog"]}, "cat", 0),
        ({"answer": "dog", "options": ["cat", "dog"], "metric": "exact"}, "B", 0),
        ({"answers": PEOPLE, "metric": "vqa"}, "2", 0.6),
        ({"answers": [{"answer": word} for word in PEOPLE], "metric": "vqa"}, "Three.", 1),
        ({"answers": ["kitten", "puppy"], "metric": "anls"}, "Sitten", 5 / 6),
        ({"answer": "kitten", "metric": "anls"}, "dog", 0),
        ({"answers": ["a cat", "the dog"], "metric": "contains"}, "I think it is THE  dog, there", 1),
        ({"answer": "dog", "metric": "contains"}, "a cat", 0),
        ({"answers": ["cat", "kitten"]}, "Kitten", 1),
    ],
)
def test_metrics(row, text, score, tmp_path):
    assert scored(tmp_path, row, text) == pytest.approx(score)


def test_nothing_contains_nothing():
    assert contains("a cat", " ") == 0 == contains("", "cat")
    assert contains("", "") == 0


def test_figures_and_tables_of_one_metric(tmp_path, capsys):
    rows = [{"question_id": i, "text": "Why?", "answer": "x", "category": ("even", "odd")[i % 2]} for i in range(4)]
    data = folder(tmp_path / "mine", *rows, toml='title = "Mine"')
    given = write_answers(tmp_path / "a.jsonl", [{"question_id": i, "text": "x" if i else "y"} for i in range(4)])
    found = said("custom", data, given, capsys)
    assert found["scores"] == {"exact": 75.0} and found["headline"] == "exact" and found["score"] == 75.0
    assert found["tables"] == {
        "Mine, by category": [
            {"category": "even", "answered": 2, "exact": 50.0},
            {"category": "odd", "answered": 2, "exact": 100.0},
        ]
    }
    assert [one["correct"] for one in found["items"]] == [False, True, True, True]
    assert found["protocol"] == "custom" and not found["subset"] and found["remarks"] == {}
    assert found["title"] == "Mine"


def test_several_metrics_have_a_mean(tmp_path):
    rows = [{"question_id": "a", "text": "?", "answer": "x"}, {"question_id": "b", "text": "?", "answer": "yes"}]
    folder(tmp_path, rows[0], rows[1] | {"metric": "yes_no"}, rows[0] | {"question_id": "c"})
    found = result(tmp_path, a="x", b="no", c="x")
    assert found.scores == {"exact": 100.0, "yes_no": 0.0, "mean": pytest.approx(200 / 3)}
    assert found.headline == "mean" and found.tables == {}


def test_the_folder_says_metric_suffix_pictures_and_tokens(tmp_path):
    (tmp_path / "pics").mkdir()
    row = {"question_id": 1, "text": "Is it?", "image": "a.jpg", "answer": "yes"}
    toml = 'metric = "yes_no"\nimages = "pics"\nsuffix = "One word."\nmax_new_tokens = 5\n'
    one, two = asked(tmp_path, row, row | {"question_id": 2, "text": "Was it?\nOne word."}, toml=toml)
    assert (one.text, two.text) == ("Is it?\nOne word.", "Was it?\nOne word.")
    assert one.images[0].path == str(tmp_path / "pics" / "a.jpg")
    assert CUSTOM.tokens(place(tmp_path)) == 5 and named("mme").tokens(place(tmp_path)) == 128
    assert result(tmp_path, **{"1": "yes sir", "2": "no"}).scores == {"yes_no": 50.0}


def test_pictures_lie_in_images_or_beside_and_may_be_several(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("images/a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    row = {"question_id": 1, "text": "Which?"}
    rows = [
        row | {"images": ["a.jpg", "b.jpg"]},
        row | {"question_id": 2},
        row | {"question_id": 3, "image": ["b.jpg"]},
    ]
    one, two, three = asked(tmp_path, *rows)
    assert [Path(image.path).resolve() for image in one.images] == [tmp_path / "images" / "a.jpg", tmp_path / "b.jpg"]
    assert two.images == () and len(three.images) == 1 and CUSTOM.tokens(place(tmp_path)) == 128
    [elsewhere] = CUSTOM.questions(official.Place(folder(tmp_path / "q", rows[2]), tmp_path / "far"))
    assert elsewhere.images[0].path == str(tmp_path / "far" / "b.jpg")


def test_right_answers_may_lie_beside(tmp_path):
    at = folder(
        tmp_path / "custom", {"question_id": 1, "text": "?"}, {"question_id": "2", "text": "?", "answer": "own"}
    )
    folder(at, {"question_id": "1", "answers": ["x", "y"]}, {"question_id": 5, "answer": "z"}, name="answers.jsonl")
    found = result(tmp_path, **{"1": "y", "2": "own"})
    assert found.scores == {"exact": 100.0} and [one["truth"] for one in found.items] == ["x | y", "own"]
    assert found.remarks == {"in answers.jsonl for no question": ["5"]}


def test_another_name_of_the_question_file(tmp_path):
    folder(tmp_path, {"question_id": 1, "text": "?", "answer": "x"}, name="my_questions_v2.jsonl")
    assert result(tmp_path, **{"1": "x"}).scores == {"exact": 100.0}
    folder(tmp_path, {"question_id": 1, "text": "?", "answer": "x"}, name="my_questions_v3.jsonl")
    with pytest.raises(ValueError, match=r"my_questions_v2\.jsonl or my_questions_v3\.jsonl"):
        CUSTOM.questions(place(tmp_path))


def test_what_is_not_answered_or_has_nothing_right_is_said(tmp_path, capsys):
    rows = [{"question_id": i, "text": "?"} | ({"answer": "x"} if i else {}) for i in range(3)]
    data = folder(tmp_path, *rows)
    given = [{"question_id": i, "text": "x"} for i in (0, 1, 1, 9)]
    found = said("custom", data, write_answers(tmp_path / "a.jsonl", given), capsys)
    assert found["partial"] and found["score"] is None and found["scores"] == {"exact": 100.0}
    assert found["remarks"] == {
        "foreign": ["9"],
        "duplicate": ["1"],
        "missing": ["2"],
        "without a right answer": ["0"],
    }
    assert [one["correct"] for one in found["items"]] == [None, True, None]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "?"}, "questions.jsonl:1: question_id is missing"),
        ({"question_id": 1}, "questions.jsonl:1: text is missing"),
        ({"question_id": 1, "text": "?", "metric": "bleu"}, f"'bleu' is unknown; choose {', '.join(METRICS)}"),
        ({"question_id": 1, "text": "?", "metric": ["exact"]}, "is unknown; choose"),
        ({"question_id": 1, "text": "?", "images": [1]}, "names of pictures are wanted"),
        ({"question_id": 1, "text": "?", "image": 7}, "names of pictures are wanted"),
        ({"question_id": 1, "text": "?", "answers": "x"}, "a list is wanted"),
        ({"question_id": 1, "text": "?", "answer": None}, "None is no text"),
        ({"question_id": 1, "text": "?", "answer": "maybe", "metric": "yes_no"}, "question_id 1: metric yes_no"),
        ({"question_id": 1, "text": "?", "answer": "E", "options": ["a", "b"]}, "question_id 1: metric option"),
    ],
)
def test_bad_rows_are_named(row, words, tmp_path, capsys):
    given = write_answers(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}])
    assert words in refused("custom", folder(tmp_path / "q", row), given, capsys).replace("\n", "")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("metric = bleu", "not TOML"),
        ('metric = "bleu"', "'bleu' is unknown"),
        ('metrics = "exact"', "metrics is unknown; it may have title"),
        ("max_new_tokens = 0", "a whole number above 0 is wanted"),
        ("max_new_tokens = true", "a whole number above 0 is wanted"),
        ("title = 7", "a text is wanted"),
        ('images = "none"', "is no folder"),
    ],
)
def test_bad_settings_are_named(toml, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        asked(tmp_path, {"question_id": 1, "text": "?"}, toml=toml)
    assert "benchmark.toml" in str(error.value)


def test_bad_files_are_named(tmp_path, capsys):
    given = write_answers(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}])
    (tmp_path / "empty").mkdir()
    assert "questions.jsonl" in refused("custom", tmp_path / "empty", given, capsys)
    row = {"question_id": 1, "text": "?"}
    assert "question_id 1" in refused("custom", folder(tmp_path / "twice", row, row), given, capsys)
    at = folder(tmp_path / "beside", row)
    for rows, words in (
        ([{"question_id": 1, "text": "x"}], "answers.jsonl:1: answer is missing"),
        ([{"answer": "x"}], "answers.jsonl:1: question_id is missing"),
        ([{"question_id": 1, "answer": "x"}] * 2, "answers.jsonl:2: question_id 1 comes a second time"),
    ):
        folder(at, *rows, name="answers.jsonl")
        assert words in refused("custom", at, given, capsys).replace("\n", "")
    (at / "questions.jsonl").write_text(json.dumps(row) + "\n{half")
    assert "questions.jsonl:2" in refused("custom", at, given, capsys).replace("\n", "")
