"""GQA: the official evaluator's numbers on made-up answers, and its file byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.evaluate.scored import GOLDEN, answer, lines, refused, result, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.gqa import distribution, prediction

GQA = GOLDEN / "gqa"
ANSWERS = GQA / "answers.jsonl"
SUMMARY = json.loads((GQA / "expected_summary.json").read_text())


def test_totals_are_those_of_the_official_evaluator():
    found = result("gqa", GQA, ANSWERS)
    assert found.scores["accuracy"] == pytest.approx(SUMMARY["accuracy"], abs=1e-9)
    for name in ("accuracy", "binary", "open", "distribution"):
        assert f"{found.scores[name]:.2f}" == f"{SUMMARY[f'{name}_2dp']:.2f}"
    assert found.headline == "accuracy" and found.questions == SUMMARY["balanced_questions"] == found.answered
    assert found.remarks == {"duplicate": ["201003293", "201003293"]}


def test_every_table_is_that_of_the_official_evaluator():
    tables = result("gqa", GQA, ANSWERS).tables
    assert set(tables) == set(SUMMARY["breakdown"])
    for title, expected in SUMMARY["breakdown"].items():
        column = title.removeprefix("Accuracy / ")
        found = {str(row[column]): (f"{row['accuracy']:.2f}", row["questions"]) for row in tables[title]}
        assert found == {name: (f"{row['score_2dp']:.2f}", row["n"]) for name, row in expected.items()}
        assert list(found) == list(expected)


def test_every_item_is_that_of_the_official_evaluator():
    items = result("gqa", GQA, ANSWERS).items
    expected = lines(GQA / "expected_items.jsonl")
    keys = ("question_id", "prediction", "balanced", "correct")
    assert [[one[key] for key in keys] for one in items] == [[one[key] for key in keys] for one in expected]
    assert [one["truth"] for one in items] == [one["answer"] for one in expected]


def test_the_command_says_the_same_and_writes_the_evaluators_file(tmp_path, capsys):
    found = said("gqa", GQA, ANSWERS, capsys, "--out", tmp_path / "out")
    assert found["score"] == found["scores"]["accuracy"] == pytest.approx(SUMMARY["accuracy"], abs=1e-9)
    assert [one["prediction"] for one in found["items"]] == [
        one["prediction"] for one in lines(GQA / "expected_items.jsonl")
    ]
    [path] = found["submission"]
    expected = (GQA / "expected_testdev_balanced_predictions.json").read_text()
    assert Path(path).read_text(encoding="utf-8") == expected


def test_only_questions_that_are_balanced_have_to_be_answered(tmp_path):
    rows = lines(ANSWERS)
    free = {
        id
        for id, one in json.loads((GQA / "testdev_balanced_questions.json").read_text()).items()
        if not one["isBalanced"]
    }
    kept = [row for row in rows if row["question_id"] not in free]
    assert len(kept) < len(rows)
    whole, without = (result("gqa", GQA, write_answers(tmp_path / "a.jsonl", these)) for these in (rows, kept))
    assert without.scores == whole.scores and not without.partial and "missing" not in without.remarks
    given = official.answers(tmp_path / "a.jsonl")[0]
    [path] = named("gqa").submission(official.place(GQA, ("gqa",)), given, tmp_path / "out")
    assert len(json.loads(path.read_text())) == len(kept)


def test_an_answer_that_is_missing_is_wrong_and_the_score_partial(tmp_path, capsys):
    gone = lines(GQA / "expected_items.jsonl")[0]["question_id"]
    file = write_answers(tmp_path / "a.jsonl", [row for row in lines(ANSWERS) if row["question_id"] != gone])
    found = said("gqa", GQA, file, capsys)
    assert found["partial"] and found["score"] is None and found["remarks"]["missing"] == [gone]
    assert found["scores"]["accuracy"] == pytest.approx(SUMMARY["accuracy"] - 100 / SUMMARY["balanced_questions"])
    assert found["items"][0]["prediction"] is None and found["items"][0]["correct"] is False
    assert gone in refused("gqa", GQA, file, capsys, "--out", tmp_path / "out")


def test_answers_to_no_question_are_named():
    place = official.place(GQA, ("gqa",))
    given = [answer("no such", "yes"), *official.answers(ANSWERS)[0]]
    assert named("gqa").score(place, given).remarks["foreign"] == ["no such"]


def test_questions_are_llavas_and_the_same_without_its_file(tmp_path):
    benchmark = named("gqa")
    asked = benchmark.questions(official.place(GQA, benchmark.folders))
    expected = lines(GQA / "llava_gqa_testdev_balanced.jsonl")
    assert [(one.id, one.text) for one in asked] == [(row["question_id"], row["text"]) for row in expected]
    assert asked[0].images[0].path == str(GQA / "data/images" / expected[0]["image"])
    (tmp_path / "gqa" / "data" / "images").mkdir(parents=True)
    shutil.copy(GQA / "testdev_balanced_questions.json", tmp_path / "gqa" / "data")
    built = benchmark.questions(official.place(tmp_path, benchmark.folders))
    assert {one.key for one in built} == {one.key for one in asked}
    assert {one.id: one.truth for one in built} == {one.id: one.truth for one in asked}
    assert {one.images[0].path.rpartition("/")[2] for one in built} == {row["image"] for row in expected}


def test_full_stops_at_the_end_go_and_nothing_else():
    assert prediction("Yes...") == "yes"
    assert prediction(" Yes. ") == " yes. "
    assert prediction(".5.") == ".5"


def test_distribution_is_chi_square_by_size_of_the_group():
    """Group a: 2 true x, predicted x once: (1-2)^2/2 = 0.5, weight 2. Group b: 1 true y, predicted: 0, weight 1."""
    triples = [("a", "x", "x"), ("a", "x", "z"), ("b", "y", "y"), (None, "q", "r")]
    assert distribution(triples) == pytest.approx(0.5 * 2 / 3 / 100)
    assert distribution([(None, "q", "q")]) == 0.0


@pytest.mark.parametrize("key", ["types", "answer", "isBalanced", "groups", "semantic", "question", "imageId"])
def test_a_key_that_is_missing_is_named(tmp_path, capsys, key):
    rows = json.loads((GQA / "testdev_balanced_questions.json").read_text())
    id = list(rows)[3]
    del rows[id][key]
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    text = refused("gqa", tmp_path, ANSWERS, capsys)
    assert id in text and key in text and "testdev_balanced_questions.json" in text


def test_bad_files_are_named(tmp_path, capsys):
    assert "testdev_balanced_questions.json" in refused("gqa", tmp_path, ANSWERS, capsys)
    (tmp_path / "testdev_balanced_questions.json").write_text("[1]")
    assert "testdev_balanced_questions.json" in refused("gqa", tmp_path, ANSWERS, capsys)
    rows = lines(GQA / "llava_gqa_testdev_balanced.jsonl")
    write_answers(tmp_path / "llava_gqa_testdev_balanced.jsonl", [rows[0], rows[1], rows[0]])
    shutil.copy(GQA / "testdev_balanced_questions.json", tmp_path)
    with pytest.raises(ValueError, match=f"jsonl:3: question_id {rows[0]['question_id']}"):
        named("gqa").questions(official.place(tmp_path, ("gqa",)))


def test_a_step_is_an_operation_that_does_not_ask(tmp_path):
    """One program for each question; three operations that ask do not count, wherever their words stand."""
    programs = [
        [("select", "dog (1)"), ("query", "name")],
        [("select", "dog (1)"), ("query", "color")],
        [("select", "dog (1)"), ("exist", "?"), ("select", "cat (2)"), ("exist", "?"), ("and", "")],
        [("choose name", "dog|cat"), ("relate", "_,left,o (3)"), ("query: name", "")],
    ]
    row = {"question": "Is it?", "imageId": "n1", "answer": "yes", "isBalanced": True, "groups": {"global": None}}
    row["types"] = {"structural": "verify", "semantic": "obj"}
    rows = {
        str(id): {**row, "semantic": [{"operation": one, "argument": of, "dependencies": []} for one, of in program]}
        for id, program in enumerate(programs)
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    found = named("gqa").score(official.place(tmp_path, ("gqa",)), [answer(0, "Yes."), answer("1", "no")])
    table = found.tables["Accuracy / steps number"]
    assert [(row["steps number"], row["questions"], row["accuracy"]) for row in table] == [
        (1, 2, 50.0),
        (2, 1, 0.0),
        (3, 1, 0.0),
    ]
    assert found.scores["accuracy"] == 25 and found.scores["accuracy_of_answered"] == 50
