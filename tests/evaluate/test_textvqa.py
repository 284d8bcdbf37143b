"""TextVQA: M4C's numbers on made-up answers, prompts with OCR tokens and without, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate import toys
from tests.evaluate.scored import GOLDEN, answer, lines, refused, result, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.textvqa import WITH, WITHOUT, kind_of, question_in

TEXTVQA = GOLDEN / "textvqa"
ANSWERS = TEXTVQA / "answers.jsonl"
SUMMARY = json.loads((TEXTVQA / "expected_summary.json").read_text())
KEYS = ("row", "question_id", "parsed_question", "normalised_pred")


def test_the_total_is_that_of_the_official_scorer():
    found = result("textvqa", TEXTVQA, ANSWERS)
    assert found.scores["accuracy"] == pytest.approx(SUMMARY["accuracy"], abs=1e-9)
    assert len(found.items) == SUMMARY["samples"] and found.questions == found.answered
    assert f"Accuracy: {found.scores['accuracy']:.2f}%" in SUMMARY["stdout"]


def test_every_item_is_that_of_the_official_scorer():
    items, expected = result("textvqa", TEXTVQA, ANSWERS).items, lines(TEXTVQA / "expected_items.jsonl")
    assert [[one[key] for key in KEYS] for one in items] == [[one[key] for key in KEYS] for one in expected]
    assert [one["score"] for one in items] == pytest.approx([one["score"] for one in expected], abs=1e-9)
    for one, official_one in zip(items, expected, strict=True):
        assert one["answer_scores"] == pytest.approx(official_one["answer_scores"], abs=1e-9)
        assert one["correct"] == (official_one["score"] > 0)


def test_the_command_says_the_same(capsys):
    found = said("textvqa", TEXTVQA, ANSWERS, capsys)
    assert found["score"] == pytest.approx(SUMMARY["accuracy"], abs=1e-9) and not found["partial"]
    expected = lines(TEXTVQA / "expected_items.jsonl")
    assert [[one[key] for key in KEYS] for one in found["items"]] == [[one[key] for key in KEYS] for one in expected]
    assert found["subset"] and found["published_questions"] == 5000
    assert len(found["remarks"]["duplicate"]) == 1 and "once more" in found["remarks"]["duplicate"][0]
    assert len(found["remarks"]["prompts"]) == 2
    assert {row["prompt"] for row in found["tables"]["prompts"]} == {WITH, WITHOUT}
    assert sum(row["questions"] for row in found["tables"]["prompts"]) == SUMMARY["samples"]


@pytest.mark.parametrize("prompt", [*SUMMARY["prompts_that_must_be_rejected"], "", "OCR tokens: a Question: b?\nc"])
def test_a_prompt_of_no_known_layout_is_refused_with_its_row(prompt, tmp_path, capsys):
    rows = lines(ANSWERS)[:3]
    rows[2] |= {"prompt": prompt}
    told = refused("textvqa", TEXTVQA, write_answers(tmp_path / "answers.jsonl", rows), capsys)
    assert "row 3" in told and rows[2]["question_id"] in told


@pytest.mark.parametrize(
    ("prompt", "question", "kind"),
    [
        ("What is it?\nReference OCR token: a, b\nAnswer.", "what is it?", WITH),
        ("Reference OCR token: a, b\nWhat IS it?\nAnswer.", "what is it?", WITH),
        (
            "Reference OCR token:\nWhat is it? Reference OCR token: x\nAnswer.",
            "what is it? reference ocr token: x",
            WITH,
        ),
        ("What is it?\nAnswer.", "what is it?", WITHOUT),
        ("What is it?\nReference OCR token: ", "what is it?", WITH),
        ("OCR tokens: a\nb\nc Question: What\nis it? Short answer:", "what\nis it?", WITH),
        ("OCR tokens: a Question: b Short answer: Question: c Short answer:", "b", WITH),
        ("ocr tokens: a Question: b Short answer:", None, WITHOUT),
        ("a\nb\nc", None, WITHOUT),
    ],
)
def test_the_question_is_found_in_every_layout(prompt, question, kind):
    assert question_in(prompt) == question and kind_of(prompt) == kind


def test_a_question_that_not_ten_people_answered_is_refused(tmp_path, capsys):
    whole = json.loads((TEXTVQA / "TextVQA_0.5.1_val.json").read_text())
    first = whole["data"][0]
    first["answers"] = first["answers"][:9]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps(whole))
    told = refused("textvqa", tmp_path, ANSWERS, capsys)
    assert "9 people's answers" in told and first["image_id"] in told


def test_missing_and_foreign_answers_are_named_and_the_score_is_partial(tmp_path, capsys):
    rows = lines(ANSWERS)[:100]
    foreign = rows[0] | {"question_id": "nowhere"}
    found = said("textvqa", TEXTVQA, write_answers(tmp_path / "some.jsonl", [*rows, foreign]), capsys)
    expected = [one["score"] for one in lines(TEXTVQA / "expected_items.jsonl")[:100]]
    assert found["score"] is None and found["partial"] and found["questions"] == 152
    assert found["scores"]["accuracy"] == pytest.approx(sum(expected), abs=1e-9)
    assert found["remarks"]["foreign"][0].startswith("nowhere") and len(found["remarks"]["missing"]) > 40


def test_answers_to_other_questions_alone_score_nothing(tmp_path, capsys):
    rows = [row | {"question_id": "nowhere"} for row in lines(ANSWERS)[:3]]
    found = said("textvqa", TEXTVQA, write_answers(tmp_path / "other.jsonl", rows), capsys)
    assert found["partial"] and found["score"] is None and found["answered"] == 0 and not found["items"]
    assert len(found["remarks"]["foreign"]) == 3 and not found["tables"]


def test_without_the_official_file_it_is_named(tmp_path, capsys):
    assert "TextVQA_0.5.1_val.json" in refused("textvqa", tmp_path, ANSWERS, capsys)
    (tmp_path / "TextVQA_0.5.1_val.json").write_text("[]")
    assert "'data'" in refused("textvqa", tmp_path, ANSWERS, capsys)


@pytest.fixture
def folder(tmp_path):
    return toys.textvqa(tmp_path).folder


def asked(folder: Path):
    return named("textvqa").questions(official.Place(folder))


def test_llavas_file_is_asked_as_it_is_and_full_marks_are_full(folder, tmp_path, capsys):
    questions, rows = asked(folder), lines(folder / "llava_textvqa_val_v051_ocr.jsonl")
    assert [(one.id, one.text) for one in questions] == [(row["question_id"], row["text"]) for row in rows]
    assert all(one.truth and Path(one.images[0].path).is_file() for one in questions)
    right = write_answers(tmp_path / "right.jsonl", toys.textvqa(tmp_path / "again").right)
    found = said("textvqa", folder, right, capsys)
    assert found["score"] == 100.0 and found["protocol"] == "llava-official"
    assert found["remarks"] == {"prompts": ["with OCR tokens, as published scores are"]}


def test_without_llavas_file_prompts_are_made_with_the_tokens_that_lie_there(folder):
    with_tokens = [(one.id, one.text, one.truth, one.images) for one in asked(folder)]
    rows = lines(folder / "llava_textvqa_val_v051_ocr.jsonl")
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert [one.text for one in asked(folder)] == [
        f"{row['text'].split(chr(10))[0]}\nAnswer the question using a single word or phrase." for row in rows
    ]
    read = {row["question_id"]: row["text"].split("\n")[1].removeprefix("Reference OCR token: ") for row in rows}
    tokens = {"data": [{"image_id": id, "ocr_tokens": text.split(", ")} for id, text in read.items()]}
    (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(tokens))
    made = [(one.id, one.text, one.truth, one.images) for one in asked(folder)]
    assert [one[0] for one in made] == [one[0] for one in with_tokens]
    for one in made:
        assert one[1].split("\n")[1] == f"Reference OCR token: {read[one[0]]}"
    assert made[1][1:] == with_tokens[1][1:]  # the toy's tokens differ per question; the file's are per picture


def test_tokens_in_the_rows_do_too_and_a_picture_without_text_keeps_the_line(folder):
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    path = folder / "TextVQA_0.5.1_val.json"
    whole = json.loads(path.read_text())
    for row in whole["data"]:
        row["ocr_tokens"] = []
    whole["data"][0]["ocr_tokens"] = ["STOP", "7:30"]
    path.write_text(json.dumps(whole))
    assert [one.text.split("\n")[1] for one in asked(folder)][:2] == [
        "Reference OCR token: STOP, 7:30",
        "Reference OCR token: ",
    ]


def test_without_tokens_the_protocol_says_so(folder):
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    given = [answer(one.id, one.truth, one.text) for one in asked(folder)]
    found = named("textvqa").score(official.Place(folder), given)
    assert found.scores["accuracy"] == 100.0 and "without OCR tokens" in found.protocol
    assert found.remarks["prompts"] == ["without OCR tokens, unlike published scores"]
