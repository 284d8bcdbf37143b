"""POPE: yes and no, counts and rates as LLaVA's script gives them for made-up answers, by order within a category."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.evaluate.scored import GOLDEN, answer, lines, refused, result, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import SHORT, named
from vistune.evaluate.benchmarks.pope import yes_or_no

POPE = GOLDEN / "pope"
CASES = {"answers.jsonl": "expected_summary.json", "answers_truncated.jsonl": "expected_summary_truncated.json"}
AGAINST = "held against the label of another question"
UNFIT = "labels that do not fit the questions"
each_case = pytest.mark.parametrize("case", CASES)


def expected(case: str) -> dict:
    return json.loads((POPE / CASES[case]).read_text())


def same_numbers(table: list[dict], scores: dict, summary: dict) -> None:
    assert {row["category"] for row in table} == set(summary["categories"])
    for row in table:
        for name, value in summary["categories"][row["category"]].items():
            assert row[name] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value)
    assert scores["f1"] == pytest.approx(100 * summary["mean_f1"], abs=1e-9)


@each_case
def test_counts_and_rates_are_those_of_llavas_script(case):
    found = result("pope", POPE, POPE / case)
    same_numbers(found.tables["categories"], found.scores, expected(case))
    for category, row in expected(case)["categories"].items():
        assert found.scores[f"{category}_yes_ratio"] == pytest.approx(row["yes_ratio"], abs=1e-9)
    assert found.headline == "f1" and found.partial == (case == "answers_truncated.jsonl")


def test_every_item_is_that_of_llavas_script():
    items = result("pope", POPE, POPE / "answers.jsonl").items
    wanted = {str(one["question_id"]): one for one in lines(POPE / "expected_items.jsonl")}
    assert len(items) == len(wanted)
    for one in items:
        row = wanted[str(one["question_id"])]
        found = (one["category"], one["answer"], one["parsed"], one["label"], one["correct"])
        assert found == (row["category"], row["raw"], row["parsed"], row["label"], row["parsed"] == row["label"])
    asked = [row["question_id"] for row in lines(POPE / "llava_pope_test.jsonl")]
    assert [one["question_id"] for one in items] == asked


@each_case
def test_the_command_says_the_same(case, capsys):
    found = said("pope", POPE, POPE / case, capsys)
    same_numbers(found["tables"]["categories"], found["scores"], expected(case))
    assert found["score"] == (None if "truncated" in case else found["scores"]["f1"])
    assert list(found["remarks"]) == (["missing"] if "truncated" in case else [])


@pytest.mark.parametrize("prompts", [True, False], ids=["with prompts", "without"])
def test_answers_out_of_order_are_held_against_others_labels_and_named(prompts, tmp_path, capsys):
    rows = lines(POPE / "answers.jsonl")
    first, second = [row for row in rows if row["question_id"] in (1, 2)]
    swapped = [second, first, *(row for row in rows if row["question_id"] not in (1, 2))]
    if not prompts:
        swapped = [{"question_id": row["question_id"], "text": row["text"]} for row in swapped]
    found = said("pope", POPE, write_answers(tmp_path / "a.jsonl", swapped), capsys)
    assert sorted(found["remarks"][AGAINST]) == ["1", "2"]
    labels = [row["label"] for row in lines(POPE / "coco" / "coco_pope_adversarial.json")]
    assert [one["label"] for one in found["items"][:2]] == [labels[1], labels[0]]


def test_prompts_that_are_in_another_order_than_ids_are_named(tmp_path, capsys):
    rows = lines(POPE / "answers.jsonl")
    rows[0], rows[1] = {**rows[0], "prompt": rows[1]["prompt"]}, {**rows[1], "prompt": rows[0]["prompt"]}
    found = said("pope", POPE, write_answers(tmp_path / "a.jsonl", rows), capsys)
    assert found["remarks"][AGAINST] == ["1", "2"]


def test_prompts_in_other_words_are_nobodys(tmp_path, capsys):
    rows = [{**row, "prompt": f"Yes or no: {row['prompt']}"} for row in lines(POPE / "answers.jsonl")]
    assert not said("pope", POPE, write_answers(tmp_path / "a.jsonl", rows), capsys)["remarks"]


def test_some_questions_of_an_evaluation_are_held_against_their_own_labels():
    benchmark, place = named("pope"), official.place(POPE, ("pope",))
    asked = benchmark.questions(place)
    given = [answer(one.id, one.truth, one.text) for one in asked[::7]]
    rows = {str(one.id): one.row for one in asked}
    told = [type(one)(id=one.id, prompt=one.prompt, text=one.text, row=rows[str(one.id)]) for one in given]
    found = benchmark.score(place, told)
    assert found.scores["f1"] == 100 and AGAINST not in found.remarks and found.answered == len(given)
    assert benchmark.score(place, given).scores["f1"] < 100


def test_foreign_and_repeated_answers_are_named():
    place = official.place(POPE, ("pope",))
    given = official.answers(POPE / "answers.jsonl")[0]
    found = named("pope").score(place, [answer("no such", "yes"), *given, given[0]])
    assert found.remarks["foreign"] == ["no such"] and found.remarks["duplicate"] == [str(given[0].id)]
    before = expected("answers.jsonl")["categories"]["adversarial"]
    row = next(row for row in found.tables["categories"] if row["category"] == "adversarial")
    assert row["samples"] == before["samples"] + 1 and row["TP"] == before["TP"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("No", "no"),
        ("no, there is", "no"),
        ("There is not", "no"),
        ("NO", "yes"),
        ("no.", "no"),
        (".no", "yes"),
        ("Yes. no", "yes"),
        ("no\n", "yes"),
        ("nothing", "yes"),
        ("cannot", "yes"),
        ("N,o", "no"),
        ("", "yes"),
    ],
)
def test_an_answer_is_no_by_a_word_of_its_first_sentence(text, parsed):
    assert yes_or_no(text) == parsed


def labels(folder, category, *given):
    folder.mkdir(exist_ok=True)
    rows = [{"question_id": i, "image": f"{i}.jpg", "text": f"Is it {i}?", "label": one} for i, one in enumerate(given)]
    return write_answers(folder / f"coco_pope_{category}.json", rows)


def test_rates_of_nothing_are_zero(tmp_path, capsys):
    labels(tmp_path, "random", "no", "no")
    labels(tmp_path, "popular", "yes")
    rows = [{"question_id": id, "text": "no"} for id in (10_000_001, 10_000_002)]
    found = said("pope", tmp_path, write_answers(tmp_path / "a.jsonl", rows), capsys)
    first, second = found["tables"]["categories"]
    assert (first["TN"], first["accuracy"], first["precision"], first["recall"], first["f1"]) == (2, 1, 0, 0, 0)
    assert (second["samples"], second["accuracy"], second["yes_ratio"]) == (0, 0, 0)
    assert found["scores"]["f1"] == 0 and found["remarks"]["missing"] == ["20000001"]


def test_questions_are_llavas_and_the_same_without_its_file(tmp_path):
    benchmark = named("pope")
    asked = benchmark.questions(official.place(POPE, benchmark.folders))
    rows = lines(POPE / "llava_pope_test.jsonl")
    assert [(one.id, one.text, one.category) for one in asked] == [
        (row["question_id"], row["text"], row["category"]) for row in rows
    ]
    assert asked[0].images[0].path == str(POPE / "val2014" / rows[0]["image"])
    shutil.copytree(POPE / "coco", tmp_path / "pope" / "coco")
    built = benchmark.questions(official.place(tmp_path, benchmark.folders))

    def of(questions, category):
        return [(one.text, one.truth, one.images[0].path[-20:]) for one in questions if one.category == category]

    for category in ("adversarial", "random", "popular"):
        assert of(built, category) == of(asked, category)
    assert [built[0].id, built[-1].id] == [1, 20_000_000 + len(of(built, "popular"))]
    assert built[0].text.endswith(SHORT) and len(built) == len(asked)


def test_labels_of_another_version_are_named(tmp_path, capsys):
    shutil.copytree(POPE, tmp_path / "pope")
    path = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    rows = lines(path)
    write_answers(path, [*rows[:-1], {**rows[-1], "text": "Is there a cow in the image?"}, rows[0]])
    remarks = said("pope", tmp_path, POPE / "answers.jsonl", capsys)["remarks"]
    assert len(remarks[UNFIT]) == 2 and f"has {len(rows) + 1} for {len(rows)} questions" in remarks[UNFIT][0]


def test_bad_files_are_named(tmp_path, capsys):
    assert "coco_pope_" in refused("pope", tmp_path, POPE / "answers.jsonl", capsys)
    shutil.copytree(POPE, tmp_path / "pope")
    path = tmp_path / "pope" / "coco" / "coco_pope_popular.json"
    rows = lines(path)
    path.unlink()
    assert "coco_pope_popular.json" in refused("pope", tmp_path, POPE / "answers.jsonl", capsys)
    del rows[2]["label"]
    write_answers(path, rows)
    assert "coco_pope_popular.json:3: label" in refused("pope", tmp_path, POPE / "answers.jsonl", capsys)
    asked = tmp_path / "pope" / "llava_pope_test.jsonl"
    write_answers(asked, [*lines(asked), lines(asked)[0]])
    assert "question_id 1 is row 1's too" in refused("pope", tmp_path, POPE / "answers.jsonl", capsys)
