"""VizWiz: test's upload byte for byte or refused, val by VizWiz's rule, and which of the two is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate import toys
from tests.evaluate.scored import GOLDEN, answer, lines, refused, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named

VIZWIZ = GOLDEN / "submission" / "vizwiz"
ANSWERS, INCOMPLETE = VIZWIZ / "answers.jsonl", VIZWIZ / "answers_incomplete.jsonl"
EXPECTED = VIZWIZ / "expected_upload.json"


def test_the_upload_is_that_of_llava(tmp_path):
    given, broken = official.answers(ANSWERS)
    [path] = named("vizwiz").submission(official.Place(VIZWIZ), given, tmp_path)
    assert path.read_bytes() == EXPECTED.read_bytes() and broken == ["151"]


def test_the_command_writes_it(tmp_path, capsys):
    found = said("vizwiz", VIZWIZ, ANSWERS, capsys, "--out", tmp_path)
    assert Path(found["submission"][0]).read_bytes() == EXPECTED.read_bytes()
    assert found["remarks"] == {"broken": [f"{ANSWERS}:151"]} and not found["partial"]
    assert found["scores"] == {} and found["score"] is None and "EvalAI" in found["scored_elsewhere"]
    upload = {row["image"]: row["answer"] for row in json.loads(EXPECTED.read_text())}
    assert [one["normalised_pred"] for one in found["items"]] == list(upload.values())


def test_an_incomplete_one_is_refused_and_every_missing_question_named(tmp_path, capsys):
    there = {row["question_id"] for row in lines(INCOMPLETE)}
    missing = [row["question_id"] for row in lines(VIZWIZ / "llava_test.jsonl") if row["question_id"] not in there]
    told = refused("vizwiz", VIZWIZ, INCOMPLETE, capsys, "--out", tmp_path / "out")
    assert missing and all(str(id) in told for id in missing) and f"{len(missing)} of 150" in told
    assert not (tmp_path / "out").exists()
    found = said("vizwiz", VIZWIZ, INCOMPLETE, capsys)
    assert found["partial"] and found["remarks"]["missing"] == [str(id) for id in missing]


def test_vizwizs_own_file_of_test_asks_the_same(tmp_path):
    folder, benchmark = toys.vizwiz_test(tmp_path).folder, named("vizwiz")
    llava = benchmark.questions(official.Place(folder))
    (folder / "llava_test.jsonl").unlink()
    own = benchmark.questions(official.Place(folder))
    assert [(one.text, one.images) for one in llava] == [(one.text, one.images) for one in own]
    assert [one.id for one in own] == [Path(one.images[0].path).name for one in own]
    [path] = benchmark.submission(official.Place(folder), [answer(one.id, "No!") for one in own], tmp_path)
    assert json.loads(path.read_text()) == [{"image": one.id, "answer": "no"} for one in own]


@pytest.fixture
def val(tmp_path):
    return toys.vizwiz_val(tmp_path)


def test_val_is_scored_by_vizwizs_rule_and_by_type(val, tmp_path, capsys):
    rows = json.loads((val.folder / "val.json").read_text())
    for row, said_so in zip(rows, (4, 2, 1), strict=True):
        row["answers"][said_so:] = [{"answer": "unanswerable", "answer_confidence": "no"}] * (10 - said_so)
    rows[2]["answer_type"] = "unanswerable"
    (val.folder / "val.json").write_text(json.dumps(rows))
    answers = write_answers(tmp_path / "right.jsonl", val.right)
    found = said("vizwiz", val.folder, answers, capsys, "--out", tmp_path / "out")
    assert [one["score"] for one in found["items"]] == pytest.approx([1.0, 0.6, 0.3], abs=1e-9)
    assert found["score"] == pytest.approx(190 / 3) and not found["submission"] and found["subset"]
    assert [one["truth"] for one in found["items"]][1:] == ["unanswerable"] * 2
    assert {row["answer type"]: row["accuracy"] for row in found["tables"]["answer type"]} == pytest.approx(
        {"other": 80.0, "unanswerable": 30.0}
    )


def test_val_asks_with_the_line_about_what_cannot_be_answered(val):
    questions = named("vizwiz").questions(official.Place(val.folder))
    assert [one.text for one in questions] == [row["prompt"] for row in val.right]
    assert all(Path(one.images[0].path).is_file() for one in questions)


def test_where_both_lie_there_the_ids_say_which(val, tmp_path):
    place, benchmark = official.Place(val.folder), named("vizwiz")
    write_answers(
        val.folder / "llava_test.jsonl", [{"question_id": 0, "image": "VizWiz_test_00000000.jpg", "text": "?"}]
    )
    of_val = [answer(row["question_id"], row["text"]) for row in val.right]
    assert benchmark.score(place, of_val).scores["accuracy"] == 100.0 and not benchmark.submission(
        place, of_val, place.root
    )
    assert benchmark.score(place, [answer(0, "x")]).scores == {} and benchmark.submission(
        place, [answer(0, "x")], tmp_path
    )


def test_a_file_that_is_not_vizwizs_is_refused(val):
    (val.folder / "val.json").write_text('{"0": {}}')
    with pytest.raises(ValueError, match=r"val\.json: not a list of objects; fetch it again from vizwiz\.org"):
        named("vizwiz").questions(official.Place(val.folder))
