"""LLaVA-Bench: what the judge is asked, what its replies amount to, and reviews that were made elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.openai_server import serving
from tests.evaluate.scored import GOLDEN, answer, lines, refused, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.llava_bench import OWN_RULE, Review, parse_score, summary
from vistune.evaluate.judge import Reply
from vistune.evaluate.official import Place

FOLDER = GOLDEN / "llava_bench"
JUDGE = FOLDER / "judge"
REVIEWS = FOLDER / "reviews"
ANSWERS = JUDGE / "answers_model.jsonl"
ASKED = json.loads((JUDGE / "expected_requests.json").read_text())
REPLIES = {one["messages"][1]["content"]: reply for one, reply in zip(ASKED["requests"], ASKED["replies"], strict=True)}
UNREAD = {1, 5, 7, 9}
"""Questions whose golden reply is no pair of grades: 8/10 7/10, nan 5, a space first, 8 seven."""
SUMMARIES = json.loads((FOLDER / "expected_summary.json").read_text())


def given_answers(path: Path = ANSWERS):
    return official.answers(path)[0]


def judging(server) -> list[str]:
    return ["--judge", server.url, "--judge-model", "tiny", "--judge-key", "VISTUNE_TEST_KEY"]


def replying(messages):
    return REPLIES[messages[-1]["content"]]


def figures(found: dict) -> dict[str, dict[str, float]]:
    rows = found["tables"]["by category"]
    return {row["category"]: {name: row[name] for name in ("ratio", "ref", "cand")} for row in rows}


def reviews(path: Path) -> list[Review]:
    rows = [(row, row.get("tuple", row.get("score"))) for row in lines(path)]
    return [Review(str(row["question_id"]), row.get("category", ""), tuple(pair)) for row, pair in rows]


@pytest.mark.parametrize("case", lines(FOLDER / "parse_score_cases.jsonl"), ids=lambda case: repr(case["review"]))
def test_first_lines_are_read_as_llava_reads_them(case):
    shown = [None if math.isnan(one) else str(one) if math.isinf(one) else one for one in parse_score(case["review"])]
    assert shown == case["scores"]


@given(st.text())
def test_any_reply_is_read_or_not(reply):
    ref, cand = parse_score(reply)
    assert (ref, cand) == (-1, -1) or " " in reply or "," in reply


@given(st.floats(0, 10), st.floats(0, 10), st.sampled_from([" ", ","]), st.text())
def test_two_numbers_are_read_whatever_follows(ref, cand, between, more):
    assert parse_score(f"{ref!r}{between}{cand!r}\n{more}") == (ref, cand)


def test_the_judge_is_asked_as_llava_asks():
    asked = named("llava_bench").requests(Place(JUDGE), given_answers())
    assert [list(one.messages) for one in asked] == [one["messages"] for one in ASKED["requests"]]
    assert {(one.temperature, one.max_tokens) for one in asked} == {(0.2, 1024)}
    assert [one.id for one in asked] == [str(row["question_id"]) for row in lines(JUDGE / "questions.jsonl")]


def test_only_what_is_answered_is_asked_the_last_of_two_answers():
    given = [answer(4, "first"), answer("4", "second"), answer(99, "foreign")]
    (asked,) = named("llava_bench").requests(Place(JUDGE), given)
    assert asked.id == "4" and "\nsecond\n" in asked.messages[1]["content"]


def test_questions_are_asked_as_they_are():
    questions = named("llava_bench_in-the-wild").questions(Place(JUDGE))
    assert [(one.id, one.text, one.category) for one in questions] == [
        (row["question_id"], row["text"], row["category"]) for row in lines(JUDGE / "questions.jsonl")
    ]
    assert questions[3].images[0].path == str(JUDGE / "images" / "002.jpg")
    assert questions[0].truth == "Reference answer 0.\nSecond line."


def test_replies_are_judged_end_to_end(tmp_path, capsys):
    with serving(reply=replying, answers_as="tiny-0314") as server:
        found = said("llava_bench", JUDGE, ANSWERS, capsys, "--out", tmp_path, *judging(server))
        again = said("llava_bench", JUDGE, ANSWERS, capsys, "--out", tmp_path, *judging(server))
        assert server.completions == 12
        assert all(one["temperature"] == 0.2 and one["max_tokens"] == 1024 for one in server.requests)
    assert found["submission"] == [str(tmp_path / "reviews.jsonl")]
    assert (tmp_path / "reviews.jsonl").read_bytes() == (JUDGE / "expected_reviews.jsonl").read_bytes()
    read = [one for one in reviews(JUDGE / "expected_reviews.jsonl") if int(one.id) not in UNREAD]
    assert figures(found) == summary(read) == figures(again)
    assert [note.split(":")[0] for note in found["remarks"]["failed"]] == ["1", "5", "7", "9"]
    assert "'8/10 7/10'" in found["remarks"]["failed"][0]
    assert (found["answered"], found["questions"], found["partial"], found["score"]) == (8, 12, True, None)
    assert found["protocol"] == "llava-official"
    by = found["judge"]
    assert (by["model"], by["answered_as"], by["replies"], by["failed"], by["cached"]) == (
        *("tiny", ["tiny-0314"], 12, 0, 0),
    )
    assert again["judge"]["cached"] == 12 and again["judge"]["first"] == by["first"]
    item = found["items"][5]
    assert item["tuple"] == [None, 5.0] and item["content"] == "nan 5" and item["correct"] is None


def test_a_request_that_failed_scores_nothing(tmp_path, capsys):
    fine = dict.fromkeys(REPLIES, "8 6")
    broken = list(REPLIES)[2]

    def reply(messages):
        return 400 if messages[-1]["content"] == broken and not mended else fine[messages[-1]["content"]]

    mended = False
    with serving(reply=reply) as server:
        found = said("llava_bench", JUDGE, ANSWERS, capsys, "--out", tmp_path, *judging(server))
        assert (found["scores"]["ratio"], found["scores"]["ref"]) == (75.0, 80.0)
        assert found["partial"] and found["score"] is None and found["judge"]["failed"] == 1
        (failed,) = found["remarks"]["failed"]
        assert failed.startswith("2: ") and "400" in failed
        assert [row["id"] for row in lines(tmp_path / "reviews.jsonl")] == [1, 2, *range(4, 13)]
        mended = True
        found = said("llava_bench", JUDGE, ANSWERS, capsys, "--out", tmp_path, *judging(server))
        assert found["score"] == 75.0 and "failed" not in found["remarks"] and server.completions == 13


def test_grades_above_ten_are_said(tmp_path):
    given = given_answers()
    result = named("llava_bench").reviewed(Place(JUDGE), given, {"0": Reply(text="85 90"), "1": Reply(text="8 7")})
    assert result.remarks["over 10"] == ["0: 85 90"]
    assert len(result.remarks["failed"]) == 10 and result.answered == 2


@pytest.mark.parametrize("reply", ["inf 5", "5 inf", "nan 5", "-1 -1", "-0.5 4", "8", ""])
def test_what_is_no_pair_of_grades_scores_nothing(reply):
    replies = {"0": Reply(text="8 6"), "1": Reply(text=reply)}
    result = named("llava_bench").reviewed(Place(JUDGE), given_answers()[:2], replies)
    assert result.scores["ratio"] == 75.0 and result.answered == 1 and len(result.remarks["failed"]) == 1


def test_a_refused_judge_scores_nothing(tmp_path, capsys):
    with serving(key="another") as server:
        error = refused("llava_bench", JUDGE, ANSWERS, capsys, "--out", tmp_path, *judging(server))
    assert "is refused" in error and not (tmp_path / "reviews.jsonl").exists()


def test_without_a_judge_there_is_no_score(tmp_path, capsys):
    found = said("llava_bench", JUDGE, ANSWERS, capsys)
    assert not found["scores"] and found["score"] is None and found["answered"] == 12
    short = write_answers(tmp_path / "short.jsonl", lines(ANSWERS)[:5])
    found = said("llava_bench", JUDGE, short, capsys)
    assert found["partial"] and len(found["remarks"]["missing"]) == 7


@pytest.fixture
def without_rules(tmp_path):
    return Path(shutil.copytree(JUDGE, tmp_path / "data", ignore=shutil.ignore_patterns("rule.json", "expected*")))


def test_without_llavas_rule_one_of_our_own_is_said(without_rules, capsys):
    with serving(reply=lambda messages: "8 6") as server:
        found = said("llava_bench", without_rules, ANSWERS, capsys, "--out", without_rules.parent, *judging(server))
    assert found["protocol"] == "llava-official, rule: vistune" and found["score"] == 75.0
    told, golden = server.requests[0]["messages"][1]["content"], ASKED["requests"][0]["messages"][1]["content"]
    assert told.split("[System]")[0] == golden.split("[System]")[0] and OWN_RULE["prompt"] in told


@pytest.mark.parametrize(
    ("file", "drop", "wants"),
    [
        ("context.jsonl", '"001.jpg"', "wants 001.jpg of context.jsonl"),
        ("answers_gpt4.jsonl", '"question_id": 3,', "wants 3 of answers_gpt4.jsonl"),
    ],
)
def test_what_is_missing_is_named(without_rules, file, drop, wants, capsys):
    path = without_rules / file
    path.write_text("".join(line for line in path.read_text().splitlines(True) if drop not in line))
    with serving() as server:
        assert wants in refused("llava_bench", without_rules, ANSWERS, capsys, *judging(server))
        assert not server.completions


def test_a_category_without_a_rule_is_named(tmp_path, capsys):
    data = Path(shutil.copytree(JUDGE, tmp_path / "data"))
    rules = json.loads((data / "rule.json").read_text())
    del rules["llava_bench_detail"]
    (data / "rule.json").write_text(json.dumps(rules))
    with serving() as server:
        error = refused("llava_bench", data, ANSWERS, capsys, *judging(server))
    assert "question 1 wants llava_bench_detail of rule.json" in error


@pytest.mark.parametrize("name", list(SUMMARIES[0]["files"]))
def test_reviews_made_elsewhere_score_as_upstream(name, capsys):
    (path,) = (one for one in REVIEWS.iterdir() if one.stem.removeprefix("gpt4_text_") == name)
    found, expected = said("llava_bench", REVIEWS, path, capsys), SUMMARIES[0]["files"][name]
    assert figures(found) == expected
    assert {key: found["scores"][key] for key in ("ratio", "ref", "cand")} == expected["all"]
    assert found["score"] == expected["all"]["ratio"] and found["headline"] == "ratio"
    kept = [one for one in reviews(path) if one.pair != (-1, -1)]
    assert {key: found["scores"][f"{key}_without_failed"] for key in ("ratio", "ref", "cand")} == summary(kept)["all"]
    assert len(found["remarks"].get("failed", [])) == len(lines(path)) - len(kept)
    assert len(found["items"]) == len(lines(path))


@pytest.mark.parametrize("call", SUMMARIES, ids=lambda call: " ".join(call["args"]))
def test_the_summary_leaves_out_what_upstream_leaves_out(call):
    out = {str(one) for one in (call["args"][3:] if "-i" in call["args"] else [])}
    paths = {one.stem.removeprefix("gpt4_text_"): one for one in REVIEWS.iterdir()}
    found = {name: summary(one for one in reviews(paths[name]) if one.id not in out) for name in call["files"]}
    assert found == call["files"]
    printed = "".join(
        f"{name}\n"
        + "".join(f"{key} {of['ratio']} {of['ref']} {of['cand']}\n" for key, of in found[name].items())
        + "=" * 33
        + "\n"
        for name in sorted(found, key=lambda name: paths[name].name)
    )
    assert printed == call["stdout"]


def test_failed_reviews_stand_beside_and_in_the_mean(capsys):
    found = said("llava_bench", REVIEWS, REVIEWS / "gpt4_text_main.jsonl", capsys)
    assert found["scores"]["ref"] == 74.5 and found["scores"]["ref_without_failed"] == 85.7
    assert len(found["remarks"]["failed"]) == 7 and not found["partial"]


def test_reviews_beside_their_questions_may_be_too_few(tmp_path, capsys):
    rows = [json.loads(line) for line in (JUDGE / "expected_reviews.jsonl").read_text().splitlines()]
    path = write_answers(tmp_path / "reviews.jsonl", [row for row in rows if row["question_id"] != 5][:10])
    found = said("llava_bench", JUDGE, path, capsys)
    assert found["partial"] and found["score"] is None and found["remarks"]["missing"] == ["5", "11"]
    assert found["items"][0]["question"] == "Describe the dining table."


def test_a_nan_in_a_review_is_no_figure(tmp_path, capsys):
    path = tmp_path / "reviews.jsonl"
    shutil.copy(JUDGE / "expected_reviews.jsonl", path)
    found = said("llava_bench", tmp_path, path, capsys)
    assert "ratio" not in found["scores"] and found["scores"]["cand"] > 0 and found["score"] is None
    assert found["scores"]["ratio_without_failed"] > 0 and "NaN" not in json.dumps(found)


def test_rows_that_are_no_reviews_are_named(tmp_path, capsys):
    rows = [
        {"question_id": 0, "tuple": [8, 7]},
        {"question_id": 1, "tuple": "8 7"},
        {"question_id": 2},
        {"question_id": 0, "tuple": [6, 7]},
    ]
    found = said("llava_bench", tmp_path, write_answers(tmp_path / "reviews.jsonl", rows), capsys)
    assert found["scores"]["ref"] == 70.0 and found["scores"]["ratio"] == 100.0  # both of question 0, as upstream
    assert found["remarks"]["without a pair of scores"] == ["1"]
    assert found["remarks"]["duplicate"] == ["0"] and len(found["remarks"]["broken"]) == 1


def test_reviews_are_not_judged_again(capsys):
    with serving() as server:
        error = refused("llava_bench", JUDGE, REVIEWS / "reviews_third.jsonl", capsys, *judging(server))
    assert "without --judge" in error


def test_figures_of_nothing_are_not_there():
    assert summary([]) == {}
    assert summary([Review("0", "", (0.0, 0.0))]) == {"all": {"ref": 0.0, "cand": 0.0}}
