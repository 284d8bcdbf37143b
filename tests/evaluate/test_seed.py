"""SEED-Bench: accuracies and upload rows as LLaVA's script gives them for made-up answers, and where it breaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.evaluate.scored import GOLDEN, answer, lines, refused, result, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import LETTER, named

SEED = GOLDEN / "seed"
CASES = {"answers.jsonl": "expected_summary.json", "answers_missing.jsonl": "expected_summary_missing.json"}
each_case = pytest.mark.parametrize("case", CASES)


def same_numbers(table: list[dict], scores: dict, summary: dict) -> None:
    assert [(row["type"], f"{row['accuracy']:.2f}") for row in table] == [
        (name, f"{value:.2f}") for name, value in summary["per_type_2dp"].items()
    ]
    for name, key in (("accuracy", "total"), ("image_accuracy", "image"), ("video_accuracy", "video")):
        assert f"{scores[name]:.2f}" == f"{summary[f'{key}_2dp']:.2f}"


@each_case
def test_accuracies_are_those_of_llavas_script(case):
    found = result("seed", SEED, SEED / case)
    same_numbers(found.tables["Accuracy / question type"], found.scores, json.loads((SEED / CASES[case]).read_text()))
    assert found.headline == "accuracy" and found.partial == ("missing" in case)


def test_every_item_is_that_of_llavas_script():
    items = result("seed", SEED, SEED / "answers.jsonl").items
    wanted = lines(SEED / "expected_items.jsonl")
    assert [{key: one[key] for key in wanted[0]} for one in items] == wanted


@each_case
def test_the_command_says_the_same(case, capsys):
    found = said("seed", SEED, SEED / case, capsys)
    same_numbers(
        found["tables"]["Accuracy / question type"], found["scores"], json.loads((SEED / CASES[case]).read_text())
    )
    whole = "missing" not in case
    assert found["score"] == (found["scores"]["accuracy"] if whole else None) and found["subset"]
    assert ("missing" in found["remarks"]) == ("accuracy_of_answered" in found["scores"]) == (not whole)


def test_upload_rows_are_those_of_llavas_script(tmp_path, capsys):
    found = said("seed", SEED, SEED / "answers.jsonl", capsys, "--out", tmp_path / "out")
    [path] = found["submission"]
    assert Path(path).read_bytes() == (SEED / "expected_upload.jsonl").read_bytes()
    assert found["scored_elsewhere"]


def test_an_upload_that_lacks_an_answer_is_not_written(tmp_path, capsys):
    text = refused("seed", SEED, SEED / "answers_missing.jsonl", capsys, "--out", tmp_path)
    assert "101700" in text and not list(tmp_path.glob("*bench*"))


def test_a_type_with_nothing_right_is_zero_percent():
    """Where LLaVA's script stops."""
    found = result("seed", SEED, SEED / "answers_type_all_wrong.jsonl")
    expected = json.loads((SEED / "expected_type_all_wrong.json").read_text())
    rows = [f"{row['type']}: {row['accuracy']:.2f}%" for row in found.tables["Accuracy / question type"]]
    assert rows == [*expected["official_stdout_before_error"].splitlines(), "Procedure Understanding: 0.00%"]


def made(folder: Path, *questions: dict) -> official.Place:
    rows = [
        {
            "question_id": str(number),
            "question": f"What is {number}?",
            "answer": "B",
            "data_id": f"p{number}",
            "data_type": "image",
            "question_type_id": 2,
            **{f"choice_{letter}": letter * 2 for letter in "abcd"},
            **one,
        }
        for number, one in enumerate(questions)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": rows, "question_type": {"Odd": 2, "Moving": 10}}))
    return official.place(folder, ("seed_bench",))


def test_the_last_of_several_answers_counts_and_odd_ones_are_named(tmp_path):
    place = made(tmp_path, {}, {})
    given = [answer(0, "A"), answer("9", "A"), answer("0", "B"), answer(1, "B ")]
    found = named("seed").score(place, given)
    assert [one["correct"] for one in found.items] == [True, False]
    assert found.remarks == {"foreign": ["9"], "duplicate": ["0"]}


def test_two_questions_of_one_id_share_its_answer(tmp_path):
    """As the published file has two."""
    place = made(tmp_path, {"question_id": "7"}, {"question_id": "7", "answer": "C"})
    found = named("seed").score(place, [answer(7, "B"), answer(7, "C")])
    assert [one["correct"] for one in found.items] == [False, True] and not found.partial
    assert found.remarks == {"question ids that stand for several questions": ["7"]}
    [path] = named("seed").submission(place, [answer(7, "B"), answer(7, "C")], tmp_path / "out")
    assert [row["prediction"] for row in lines(path)] == ["C", "C"]


def test_an_upload_has_the_ids_as_they_stand_in_the_questions(tmp_path):
    place = made(tmp_path, {"question_id": 7}, {"question_id": "v8"})
    [path] = named("seed").submission(place, [answer("v8", "B"), answer("7", "A")], tmp_path / "out")
    assert lines(path) == [{"question_id": 7, "prediction": "A"}, {"question_id": "v8", "prediction": "B"}]


def test_questions_are_llavas_and_the_same_without_its_file(tmp_path):
    benchmark = named("seed-bench")
    asked = benchmark.questions(official.place(SEED, benchmark.folders))
    rows = lines(SEED / "llava-seed-bench.jsonl")
    assert [(one.id, one.text) for one in asked] == [(row["question_id"], row["text"]) for row in rows]
    (tmp_path / "seed_bench").mkdir()
    shutil.copy(SEED / "SEED-Bench.json", tmp_path / "seed_bench")
    built = benchmark.questions(official.place(tmp_path, benchmark.folders))
    assert [(str(one.id), one.text, one.truth, one.category) for one in built] == [
        (str(one.id), one.text, one.truth, one.category) for one in asked
    ]


def test_a_picture_is_its_data_and_a_video_its_frame(tmp_path, capsys):
    place = made(tmp_path, {}, {"question_id": "v5", "data_type": "video", "question_type_id": 10})
    first, second = named("seed").questions(place)
    assert first.text == "What is 0?\nA. aa\nB. bb\nC. cc\nD. dd" + LETTER
    assert first.images[0].path == str(tmp_path / "SEED-Bench-image" / "p0")
    assert second.images[0].path == str(tmp_path / "SEED-Bench-video-image" / "10_v5.png")
    assert "1 questions are about videos" in capsys.readouterr().err
    assert named("seed").score(place, [answer(0, "B")]).remarks["videos without frames"]
    (tmp_path / "SEED-Bench-video-image").mkdir()
    named("seed").questions(place)
    assert not capsys.readouterr().err
    assert "videos without frames" not in named("seed").score(place, [answer(0, "B")]).remarks


@pytest.mark.parametrize(
    "key", ["question_id", "question", "answer", "choice_c", "data_id", "data_type", "question_type_id"]
)
def test_a_key_that_is_missing_is_named(tmp_path, capsys, key):
    made(tmp_path, {}, {})
    found = json.loads((tmp_path / "SEED-Bench.json").read_text())
    del found["questions"][1][key]
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(found))
    text = refused("seed", tmp_path, SEED / "answers.jsonl", capsys)
    assert "SEED-Bench.json" in text and f"{key} is missing" in text


def test_bad_files_are_named(tmp_path, capsys):
    assert "SEED-Bench.json" in refused("seed", tmp_path, SEED / "answers.jsonl", capsys)
    (tmp_path / "SEED-Bench.json").write_text("[]")
    assert "SEED-Bench.json" in refused("seed", tmp_path, SEED / "answers.jsonl", capsys)
    place = made(tmp_path, {})
    write_answers(tmp_path / "llava-seed-bench.jsonl", [{"question_id": 1, "text": "?"}])
    with pytest.raises(ValueError, match=r"llava-seed-bench\.jsonl:1: image is missing"):
        named("seed").questions(place)
