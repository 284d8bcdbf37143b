"""MME: calculation.py's numbers and lmms-eval's on made-up answers, both layouts, pairs, and the official files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluate.scored import GOLDEN, answer, lines, refused, result, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.mme import CATEGORIES, parse_lmms_eval, parse_official

MME = GOLDEN / "mme"
ANSWERS = MME / "answers.jsonl"
SUMMARY = json.loads((MME / "expected_summary.json").read_text())
KEYS = ("question_id", "answer", "truth", "parsed_official", "parsed_lmms_eval")
RELEASE = "MME_Benchmark_release_version"
ASKED = "Is it?\nAnswer the question using a single word or phrase."


def release(folder: Path, *pairs: tuple[str, str], category: str = "existence", name: str = "0000.txt") -> Path:
    """A release of one picture."""
    path = folder / RELEASE / category / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{question}\t{truth}\n" for question, truth in pairs), encoding="utf-8")
    return folder


def small(folder: Path) -> Path:
    return release(folder, ("Is it? Please answer yes or no.", "Yes"), ("Was it?  Please answer yes or no.", "No"))


def test_scores_are_those_of_calculation_py():
    found = result("mme", MME, ANSWERS)
    expected = SUMMARY["official"]
    for side in ("perception", "cognition"):
        assert found.scores[side] == pytest.approx(expected[side], abs=1e-6)
    assert {name: found.scores[name] for name in CATEGORIES} == pytest.approx(expected["per_category"], abs=1e-6)
    assert found.headline == "perception" and found.questions == found.answered == 168 and not found.remarks


def test_the_second_table_is_lmms_evals():
    first, second = result("mme", MME, ANSWERS).tables.values()
    expected = SUMMARY["lmms_eval"]
    found = {row["category"]: row["score"] for row in second}
    assert found == pytest.approx(
        expected["per_category"] | {side: expected[side] for side in ("perception", "cognition")}, abs=1e-6
    )
    assert all(row["score"] == row["acc"] + row["acc_plus"] for row in (*first, *second) if "acc" in row)
    assert {row["category"]: row["score"] for row in first} != found


def test_items_are_those_of_the_two_scorers():
    items = result("mme", MME, ANSWERS).items
    expected = lines(MME / "expected_items.jsonl")
    keys = ("question_id", "text", "gold", "parsed_official", "parsed_lmms_eval")
    assert [[one[key] for key in KEYS] for one in items] == [[one[key] for key in keys] for one in expected]
    assert all(one["correct"] == (one["parsed_official"] == one["truth"].lower()) for one in items)


@pytest.mark.parametrize("case", lines(MME / "parse_cases.jsonl"), ids=lambda case: repr(case["text"]))
def test_parsers(case, tmp_path):
    text = case["text"]
    assert parse_lmms_eval(text) == case["parsed_lmms_eval"]
    assert case["parsed_official"] in (None, parse_official(text))
    found = named("mme").score(official.place(small(tmp_path), ("MME",)), [answer("existence/0000.png", text, ASKED)])
    assert found.items[0]["parsed_official"] == case["parsed_official"]
    assert ("tab or line end in the answer" in found.remarks) == (case["parsed_official"] is None)


def test_the_command_says_the_same_and_writes_what_calculation_py_reads(tmp_path, capsys):
    found = said("mme", MME, ANSWERS, capsys, "--out", tmp_path / "out")
    assert found["scores"]["perception"] == pytest.approx(SUMMARY["official"]["perception"], abs=1e-6)
    assert found["score"] == found["scores"]["perception"] and found["subset"] and not found["partial"]
    assert [[one[key] for key in KEYS[:2]] for one in found["items"]] == [
        [one["question_id"], one["text"]] for one in lines(MME / "expected_items.jsonl")
    ]
    assert sorted(Path(path).stem for path in found["submission"]) == sorted(CATEGORIES)
    for category in CATEGORIES:
        assert calculated(tmp_path / "out" / "results" / f"{category}.txt") == pytest.approx(
            SUMMARY["official"]["per_category"][category], abs=1e-6
        )


def calculated(path: Path) -> float:
    """A category's score from its file as calculation.py reads it: lines by twos, four cells each."""
    rights = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        file, question, truth, text = line.split("\t")
        assert file.endswith(".txt") and "Please answer yes or no." in question and truth in ("Yes", "No")
        start = text.lower()[:4]
        rights.append(truth.lower() == ("yes" if "yes" in start else "no" if "no" in start else "other"))
    pairs = list(zip(rights[::2], rights[1::2], strict=True))
    return 100 * sum(rights) / len(rights) + 100 * sum(map(all, pairs)) / len(pairs)


def test_official_files_hold_the_questions_as_released(tmp_path):
    place = official.place(small(tmp_path), ("MME",))
    given = [answer("existence/0000.png", "Yes\tit\nis", ASKED), answer("existence/0000.png", "no", "Was it?")]
    [path] = named("mme").submission(place, given, tmp_path / "out")
    assert path.read_bytes() == (
        b"0000.txt\tIs it? Please answer yes or no.\tYes\tYes it is\n"
        b"0000.txt\tWas it?  Please answer yes or no.\tNo\tno\n"
    )


def test_answers_in_any_order_find_their_questions(tmp_path, capsys):
    rows = lines(ANSWERS)
    random.Random(0).shuffle(rows)
    found = said("mme", MME, write_answers(tmp_path / "a.jsonl", rows), capsys)
    assert found["scores"] == pytest.approx(result("mme", MME, ANSWERS).scores)


def test_questions_are_llavas_and_the_same_without_its_file(tmp_path):
    benchmark = named("mme")
    asked = benchmark.questions(official.place(MME, benchmark.folders))
    expected = lines(MME / "llava_mme.jsonl")
    assert [(one.id, one.text, one.category) for one in asked] == [
        (row["question_id"], row["text"], row["category"]) for row in expected
    ]
    assert asked[0].images[0].path == str(MME / RELEASE / expected[0]["image"])
    assert [one.truth for one in asked] == [one["gold"] for one in lines(MME / "expected_items.jsonl")]
    shutil.copytree(MME / RELEASE, tmp_path / "MME" / RELEASE)
    for row in expected:
        path = tmp_path / "MME" / RELEASE / row["image"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    built = benchmark.questions(official.place(tmp_path, benchmark.folders))
    assert [(one.id, one.text, one.category) for one in built] == [(one.id, one.text, one.category) for one in asked]
    assert all(Path(one.images[0].path).is_file() for one in built)
    assert {one.truth for one in built} == {"Yes", "No"}


def test_a_score_needs_no_file_of_llava(tmp_path, capsys):
    shutil.copytree(MME / RELEASE, tmp_path / RELEASE)
    found = said("mme", tmp_path, ANSWERS, capsys)
    assert found["score"] == pytest.approx(SUMMARY["official"]["perception"], abs=1e-6)


def test_what_is_missing_foreign_and_twice_is_said(tmp_path, capsys):
    rows = lines(ANSWERS)
    more = rows[5] | {"text": "maybe"}, rows[7] | {"question_id": "existence/7777.png"}, rows[9] | {"prompt": "Why?"}
    found = said("mme", MME, write_answers(tmp_path / "a.jsonl", [*rows[1:], *more]), capsys)
    assert found["partial"] and found["score"] is None and found["answered"] == 167
    assert found["remarks"]["missing"] == ["existence/0000"] and found["remarks"]["duplicate"] == ["existence/0002"]
    assert found["remarks"]["foreign"] == ["existence/7777", "existence/0004"]
    assert found["items"][0]["correct"] is None and found["items"][5]["answer"] == "maybe"
    file = write_answers(tmp_path / "b.jsonl", rows[1:])
    assert "existence/0000" in refused("mme", MME, file, capsys, "--out", tmp_path / "out")


def test_what_is_answered_alone_counts(tmp_path):
    place = official.place(small(tmp_path), ("MME",))
    half = named("mme").score(place, [answer("existence/0000.png", "Yes", ASKED)])
    assert half.scores == {"perception": 100.0, "existence": 100.0} and half.partial


def test_bad_files_are_named(tmp_path, capsys):
    assert RELEASE in refused("mme", tmp_path, ANSWERS, capsys)
    data = release(tmp_path / "odd", ("Is it? Please answer yes or no.", "Yes"))
    assert "0000.txt: 1 questions" in refused("mme", data, ANSWERS, capsys)
    data = release(tmp_path / "maybe", ("Is it?", "Maybe"), ("Was it?", "No"))
    assert "0000.txt:1" in refused("mme", data, ANSWERS, capsys)
    data = small(tmp_path / "key")
    row = {"question_id": "existence/0000.png", "image": "existence/0000.png", "text": ASKED}
    for key in row:
        write_answers(data / "llava_mme.jsonl", [{name: value for name, value in row.items() if name != key}])
        assert f"llava_mme.jsonl:1: {key} is missing" in refused("mme", data, ANSWERS, capsys)
    write_answers(data / "llava_mme.jsonl", [row | {"question_id": "colour/0000.png"}])
    assert "'colour' is no category" in refused("mme", data, ANSWERS, capsys)
    write_answers(data / "llava_mme.jsonl", [row])
    assert "existence/0000 is asked 1 questions" in refused("mme", data, ANSWERS, capsys)
    write_answers(data / "llava_mme.jsonl", [row, row | {"text": "Why?"}])
    assert "no answer to 'Why?'" in refused("mme", data, ANSWERS, capsys)
    file = write_answers(tmp_path / "a.jsonl", [{"question_id": "existence/0000.png", "text": "Yes"}])
    assert "existence/0000.png has no prompt" in refused("mme", MME, file, capsys).replace("\n", " ")


def test_pictures_are_found_from_a_relative_folder_too(tmp_path, monkeypatch):
    picture = tmp_path / "data" / "MME" / "MME_Benchmark_release_version" / "count" / "0.jpg"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(picture)
    picture.with_suffix(".txt").write_text("One? Please answer yes or no.\tYes\nTwo? Please answer yes or no.\tNo\n")
    monkeypatch.chdir(tmp_path)
    mme = named("mme")
    asked = mme.questions(official.place(Path("data"), mme.folders))
    assert len(asked) == 2 and all(Path(one.images[0].path).samefile(picture) for one in asked)
