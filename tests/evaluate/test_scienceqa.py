"""ScienceQA: letters, accuracies and per-problem detail as LLaVA's script gives them for made-up answers."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.evaluate.scored import GOLDEN, refused, result, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import LETTER, named
from vistune.evaluate.benchmarks.scienceqa import FAILED, index, letter

SQA = GOLDEN / "scienceqa"
ANSWERS = SQA / "answers.jsonl"
SUMMARY = json.loads((SQA / "expected_summary.json").read_text())
OUTPUT = json.loads((SQA / "expected_output.json").read_text())
RESULT = json.loads((SQA / "expected_result.json").read_text())
EXPECTED = {one["question_id"]: one for kind in ("correct", "incorrect") for one in OUTPUT[kind]}
KEYS = ("question_id", "parsed_ans", "ground_truth", "question", "pred", "is_multimodal")


def test_totals_are_those_of_llavas_script():
    found = result("scienceqa", SQA, ANSWERS)
    assert found.scores["accuracy"] == pytest.approx(RESULT["acc"], abs=1e-9)
    assert f"{found.scores['img_accuracy']:.2f}" == f"{SUMMARY['img_accuracy_2dp']:.2f}"
    assert found.scores["img_accuracy"] == pytest.approx(100 * SUMMARY["img_correct"] / SUMMARY["img_total"], abs=1e-9)
    assert found.questions == SUMMARY["total"] and found.answered == SUMMARY["total"] - len(SUMMARY["missing_ids"])


def test_every_problem_is_that_of_llavas_script():
    items = result("scienceqa", SQA, ANSWERS).items
    assert [one["question_id"] for one in items] == list(RESULT["results"])
    assert [{key: one[key] for key in KEYS} for one in items if one["answer"] is not None] == [
        EXPECTED[one["question_id"]] for one in items if one["answer"] is not None
    ]
    assert {one["question_id"]: one["index"] for one in items} == RESULT["results"]
    assert {one["question_id"]: one["pred"] for one in items} == RESULT["outputs"]
    assert {one["question_id"] for one in items if one["correct"]} == {o["question_id"] for o in OUTPUT["correct"]}


def test_odd_answers_are_named_and_a_problem_without_one_failed():
    found = result("scienceqa", SQA, ANSWERS)
    assert found.remarks == {"foreign": ["999999"], "duplicate": ["120"], "missing": SUMMARY["missing_ids"]}
    missing = [one for one in found.items if one["question_id"] in SUMMARY["missing_ids"]]
    assert len(missing) == 4
    for one in missing:
        assert (one["answer"], one["parsed_ans"], one["is_multimodal"], one["correct"]) == (None, FAILED, False, False)


def test_the_command_says_the_same_and_that_it_is_partial(capsys):
    found = said("scienceqa", SQA, ANSWERS, capsys)
    assert found["partial"] and found["score"] is None and found["subset"] and found["share"] == 86 / 90
    assert found["scores"]["accuracy"] == pytest.approx(RESULT["acc"], abs=1e-9)
    assert {one["question_id"]: one["index"] for one in found["items"]} == RESULT["results"]


def test_tables_count_what_their_groups_hold():
    found = result("scienceqa", SQA, ANSWERS)
    problems = json.loads((SQA / "base" / "problems.json").read_text())
    right = {one["question_id"]: one["correct"] for one in found.items}
    for row in found.tables["Accuracy / subject"]:
        ids = [id for id in right if problems[id]["subject"] == row["subject"]]
        assert row["questions"] == len(ids) > 0
        assert row["accuracy"] == pytest.approx(100 * sum(right[id] for id in ids) / len(ids))
    assert found.tables["Accuracy / grade"] == [
        {"grade": "1-6", "accuracy": found.scores["accuracy"], "questions": SUMMARY["total"]}
    ]
    groups = {
        "text": lambda one: one["hint"],
        "image": lambda one: one["image"],
        "none": lambda one: not one["hint"] and not one["image"],
    }
    rows = {row["context"]: row for row in found.tables["Accuracy / context"]}
    assert list(rows) == ["text", "image", "none"]
    for name, holds in groups.items():
        ids = [id for id in right if holds(problems[id])]
        assert rows[name]["questions"] == len(ids) and rows[name]["accuracy"] == pytest.approx(
            100 * sum(right[id] for id in ids) / len(ids)
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("F", FAILED),
        ("E. out", "E"),
        ("F. out", FAILED),
        ("B. ", "B"),
        ("B.", FAILED),
        ("B.x", FAILED),
        ("The answer is B", FAILED),
        ("The answer is Boy", "B"),
        ("The answer is Z.", "Z"),
        ("Hm. The answer is B. Or: The answer is B.", FAILED),
        ("The answer is B\n", FAILED),
        (" A", FAILED),
        ("AB", FAILED),
        ("", FAILED),
    ],
)
def test_a_letter_is_read_by_the_scripts_three_rules(text, expected):
    assert letter(text) == expected


def test_a_letter_counts_only_among_the_choices():
    assert [index(one, 3) for one in ("A", "C", "D", "Z", FAILED)] == [0, 2, -1, -1, -1]


def place_with(tmp_path, problems, asked=None):
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    if asked is not None:
        (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(asked))
    return official.place(tmp_path, ("scienceqa",))


PROBLEMS = {
    "4": {"question": "Which?\nSing.", "choices": ["one", "two"], "answer": 1, "hint": "", "image": None},
    "5": {"question": "What?", "choices": ["a  b", "c"], "answer": 0, "hint": "Look.  Now.", "image": "image.png"},
}
ASKED = [
    {"id": "4", "conversations": [{"from": "human", "value": "Which?\nSing.\nA. one\nB. two"}]},
    {
        "id": "5",
        "image": "5/image.png",
        "conversations": [{"from": "human", "value": "<image>\nContext: Look. Now.\nWhat?\nA. a b\nB. c"}],
    },
]


@pytest.mark.parametrize("asked", [None, ASKED], ids=["built from the problems", "LLaVA's file"])
def test_questions_are_asked_as_llava_asks_them(tmp_path, asked):
    (tmp_path / "images" / "test" / "5").mkdir(parents=True)
    (tmp_path / "images" / "test" / "5" / "image.png").touch()
    first, second = named("sqa").questions(place_with(tmp_path, PROBLEMS, asked))
    assert (first.id, first.images, first.truth) == ("4", (), "B")
    assert first.text == "Which?\nSing.\nA. one\nB. two" + LETTER
    assert second.text == "<image>\nContext: Look. Now.\nWhat?\nA. a b\nB. c" + LETTER
    assert second.images[0].path == str(tmp_path / "images" / "test" / "5" / "image.png") and second.truth == "A"


def test_pictures_are_found_beside_the_problems(tmp_path):
    shutil.copytree(SQA / "base", tmp_path / "data")
    (tmp_path / "data" / "images" / "test" / "107").mkdir(parents=True)
    (tmp_path / "data" / "images" / "test" / "107" / "image.png").touch()
    first = named("scienceqa").questions(official.place(tmp_path, ("scienceqa",)))[0]
    assert first.images[0].path == str(tmp_path / "data" / "images" / "test" / "107" / "image.png")


def test_prompts_that_do_not_show_the_picture_are_named(tmp_path, capsys):
    place_with(tmp_path, PROBLEMS)
    rows = [{"question_id": id, "prompt": "What?", "text": "B"} for id in PROBLEMS]
    found = said("scienceqa", tmp_path, write_answers(tmp_path / "a.jsonl", rows), capsys)
    assert found["scores"] == {"accuracy": 50.0} and found["score"] is None
    assert found["remarks"] == {"prompts without <image> to a problem with a picture": ["5"]}


def test_bad_files_are_named(tmp_path, capsys):
    assert "problems.json" in refused("scienceqa", tmp_path, ANSWERS, capsys)
    place_with(tmp_path, [])
    assert "problems.json: problems are {id" in refused("scienceqa", tmp_path, ANSWERS, capsys)
    place_with(tmp_path, PROBLEMS)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["4", "7"]}))
    assert "problem 7" in refused("scienceqa", tmp_path, ANSWERS, capsys)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["4", "4"]}))
    assert "problem 4 is there twice" in refused("scienceqa", tmp_path, ANSWERS, capsys)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": []}))
    assert "test is missing" in refused("scienceqa", tmp_path, ANSWERS, capsys)
    place_with(tmp_path, {**PROBLEMS, "5": {**PROBLEMS["5"], "answer": 2}})
    assert "problems.json:5: answer 2" in refused("scienceqa", tmp_path, ANSWERS, capsys)
    place_with(tmp_path, {**PROBLEMS, "5": {"question": "What?", "answer": 0}})
    assert "problems.json:5: choices is missing" in refused("scienceqa", tmp_path, ANSWERS, capsys)


def test_a_problem_asked_twice_is_named(tmp_path):
    place = place_with(tmp_path, PROBLEMS, [*ASKED, ASKED[0]])
    with pytest.raises(ValueError, match=r"CQM-A\.json: problem 4 is there twice"):
        named("scienceqa").questions(place)
