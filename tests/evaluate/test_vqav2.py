"""VQAv2: test's upload byte for byte, val by VQA's rule, and which of the two is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate import toys
from tests.evaluate.scored import GOLDEN, answer, lines, refused, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named

VQAV2 = GOLDEN / "submission" / "vqav2"
ANSWERS = VQAV2 / "answers" / "llava_vqav2_mscoco_test-dev2015" / "llava-v1.5-tiny" / "merge.jsonl"
EXPECTED = VQAV2 / "expected_upload.json"


def test_the_upload_is_that_of_llava(tmp_path):
    given, broken = official.answers(ANSWERS)
    [path] = named("vqav2").submission(official.Place(VQAV2), given, tmp_path)
    assert path.read_bytes() == EXPECTED.read_bytes() and broken == ["157"]
    rows = json.loads(path.read_text())
    summary = json.loads((VQAV2 / "expected_summary.json").read_text())
    assert len(rows) == summary["rows"] and sum(not row["answer"] for row in rows) == summary["empty"]


def test_the_command_writes_it_and_names_what_is_odd(tmp_path, capsys):
    found = said("vqav2", VQAV2, ANSWERS, capsys, "--out", tmp_path)
    assert Path(found["submission"][0]).read_bytes() == EXPECTED.read_bytes()
    assert found["scores"] == {} and found["score"] is None and "EvalAI" in found["scored_elsewhere"]
    assert found["remarks"]["foreign"] == ["1"] and found["remarks"]["duplicate"] == ["262144087"]
    assert found["remarks"]["broken"] == [f"{ANSWERS}:157"] and len(found["remarks"]["missing"]) == 16
    assert (found["questions"], found["answered"], found["partial"]) == (155, 139, True)
    upload = {row["question_id"]: row["answer"] for row in json.loads(EXPECTED.read_text())}
    assert all(one["normalised_pred"] in (None, upload[one["question_id"]]) for one in found["items"])


def test_without_the_list_of_all_of_test_nothing_is_handed_in(tmp_path, capsys):
    name = "llava_vqav2_mscoco_test-dev2015.jsonl"
    (tmp_path / name).write_text((VQAV2 / name).read_text())
    assert not said("vqav2", tmp_path, ANSWERS, capsys)["submission"]
    told = refused("vqav2", tmp_path, ANSWERS, capsys, "--out", tmp_path / "out")
    assert "llava_vqav2_mscoco_test2015.jsonl" in told and not (tmp_path / "out").exists()


def test_vqas_own_files_of_test_ask_and_upload_the_same(tmp_path):
    place, own = toys.vqav2_test(tmp_path).folder, tmp_path / "own"
    own.mkdir()
    for split in ("test-dev2015", "test2015"):
        rows = lines(place / f"llava_vqav2_mscoco_{split}.jsonl")
        questions = [
            {
                "question_id": row["question_id"],
                "image_id": int(row["image"].removesuffix(".jpg").rpartition("_")[2]),
                "question": row["text"].split("\n")[0],
            }
            for row in rows
        ]
        (own / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": questions}))
    benchmark = named("vqav2")
    asked = [benchmark.questions(official.Place(one, place / "test2015")) for one in (place, own)]
    assert [(one.id, one.text, one.images) for one in asked[0]] == [(one.id, one.text, one.images) for one in asked[1]]
    assert len(asked[0]) == 2 and all(Path(one.images[0].path).is_file() for one in asked[0])
    given = [answer(0, "The Dog."), answer("1", "two")]
    written = [benchmark.submission(official.Place(one), given, one / "out")[0].read_text() for one in (place, own)]
    assert written[0] == written[1]
    assert json.loads(written[0]) == [
        {"question_id": 0, "answer": "dog"},
        {"question_id": 1, "answer": "2"},
        {"question_id": 2, "answer": ""},
    ]


@pytest.fixture
def val(tmp_path):
    return toys.vqav2_val(tmp_path)


def test_val_is_scored_by_vqas_rule_and_by_types(val, tmp_path, capsys):
    found = said("vqav2", val.folder, write_answers(tmp_path / "right.jsonl", val.right), capsys, "--out", tmp_path)
    assert found["score"] == pytest.approx(100.0) and not found["submission"] and found["questions"] == val.questions
    assert {row["answer type"]: row["questions"] for row in found["tables"]["answer type"]} == {"number": 3, "other": 3}
    assert [one["truth"] for one in found["items"]] == [row["text"] for row in val.right]
    wrong = [row | {"text": "Something else."} for row in val.right]
    found = said("vqav2", val.folder, write_answers(tmp_path / "wrong.jsonl", wrong), capsys)
    assert found["score"] == pytest.approx(90.0)  # three of ten said so: 3 x 2/3 + 7 x 1
    assert all(one["normalised_pred"] == "something else" for one in found["items"])


def test_val_is_scored_without_the_questions_file(val, tmp_path, capsys):
    (val.folder / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    assert said("vqav2", val.folder, write_answers(tmp_path / "right.jsonl", val.right), capsys)["score"] == 100.0
    with pytest.raises(ValueError, match=r"val2014_questions\.json is not there"):
        named("vqav2").questions(official.Place(val.folder))


def test_half_of_val_is_partial_and_every_oddity_is_named(val, tmp_path, capsys):
    rows = [*val.right[:3], val.right[0] | {"text": "nothing"}, val.right[0] | {"question_id": 77}]
    found = said("vqav2", val.folder, write_answers(tmp_path / "half.jsonl", rows), capsys)
    assert found["score"] is None and found["share"] == 0.5
    assert found["scores"]["accuracy"] == pytest.approx(200 / 3)  # the later answer counts
    assert found["remarks"] == {"foreign": ["77"], "duplicate": ["0"], "missing": ["1001", "2000", "2001"]}


def test_where_both_lie_there_the_ids_say_which(val, tmp_path):
    place, benchmark = official.Place(val.folder), named("vqav2")
    every = [{"question_id": 10**6 + i, "image": f"{i}.jpg", "text": "What?", "category": ""} for i in range(2)]
    write_answers(val.folder / "llava_vqav2_mscoco_test2015.jsonl", every)
    assert len(benchmark.questions(place)) == val.questions
    of_val = [answer(row["question_id"], row["text"]) for row in val.right]
    of_test = [answer(10**6 + i, "x") for i in range(2)]
    assert benchmark.score(place, of_val).scores["accuracy"] == 100.0 and not benchmark.submission(
        place, of_val, place.root
    )
    assert benchmark.score(place, of_test).scores == {} and benchmark.submission(place, of_test, tmp_path)


def test_a_question_without_an_annotation_is_named(val):
    path = val.folder / "v2_mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"annotations": json.loads(path.read_text())["annotations"][1:]}))
    with pytest.raises(ValueError, match="no annotation of question 0"):
        named("vqav2").questions(official.Place(val.folder))
