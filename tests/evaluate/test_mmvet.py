"""MM-Vet: the official scorer's file, what a judge is asked, and what its grades amount to per ability."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.evaluate.openai_server import serving
from tests.evaluate.scored import GOLDEN, answer, refused, said, write_answers
from vistune.evaluate import official
from vistune.evaluate.benchmarks import named
from vistune.evaluate.benchmarks.mmvet import OWN_PROMPT, MMVet, parse_grade
from vistune.evaluate.judge import Judge, Reply, ask
from vistune.evaluate.official import Place

FOLDER = GOLDEN / "submission" / "mmvet"

FACTS = {
    "v1_0": ("What is x?", "-1<AND>-5", ["ocr", "math"]),
    "v1_1": ("Which city is this?", "Oslo<OR>Kristiania", ["know"]),
    "v1_2": ("What colour is the cup?", "red", ["rec"]),
    "v1_3": ("What does it cost?", "$4", ["math", "ocr"]),
    "v1_4": ("Tell a story of it.", "a long one", ["know", "gen", "rec"]),
}
GRADES = {"0": 1.0, "1": 0.5, "2": 0.0, "3": 0.4, "4": 0.9}


@pytest.fixture
def data(tmp_path) -> Path:
    """MM-Vet in small: LLaVA's question file and the benchmark's own."""
    folder = tmp_path / "mm-vet"
    folder.mkdir()
    facts = {
        name: {"imagename": f"{name}.jpg", "question": q, "answer": a, "imagesource": "made up", "capability": c}
        for name, (q, a, c) in FACTS.items()
    }
    (folder / "mm-vet.json").write_text(json.dumps(facts))
    rows = [
        {"question_id": int(name[3:]), "image": fact["imagename"], "text": fact["question"], "category": "default"}
        for name, fact in facts.items()
    ]
    write_answers(folder / "llava-mm-vet.jsonl", rows)
    return folder


@pytest.fixture
def answers(tmp_path) -> Path:
    return write_answers(tmp_path / "answers.jsonl", [{"question_id": i, "text": f"answer {i}"} for i in range(5)])


def judging(server) -> list[str]:
    return ["--judge", server.url, "--judge-model", "tiny", "--judge-key", "VISTUNE_TEST_KEY"]


def replying(messages) -> str:
    """The grade of the answer in the table's last line."""
    return str(GRADES[messages[-1]["content"].split(" | ")[-2].removeprefix("answer ")])


def table(found: dict, title: str) -> dict[str, tuple[int, float]]:
    return {next(iter(row.values())): (row["questions"], row["score"]) for row in found["tables"][title]}


def test_the_official_file_is_written(tmp_path, capsys):
    found = said("mm-vet", FOLDER, FOLDER / "answers.jsonl", capsys, "--out", tmp_path)
    assert found["submission"] == [str(tmp_path / "mmvet-results.json")]
    assert (tmp_path / "mmvet-results.json").read_bytes() == (FOLDER / "expected.json").read_bytes()
    assert not found["scores"] and found["score"] is None and found["subset"]


def test_ids_may_be_the_benchmarks_own(tmp_path):
    rows = [answer("v1_3", "first"), answer(7, "other"), answer(3, "last")]
    (path,) = MMVet().submission(Place(tmp_path), rows, tmp_path)
    assert list(json.loads(path.read_text()).items()) == [("v1_3", "last"), ("v1_7", "other")]


def test_questions_are_asked_as_they_are(data):
    asked = named("mmvet").questions(Place(data))
    assert [(one.id, one.text) for one in asked] == [(i, FACTS[f"v1_{i}"][0]) for i in range(5)]
    assert asked[0].images[0].path == str(data / "images" / "v1_0.jpg")
    assert [one.category for one in asked] == ["ocr_math", "know", "rec", "ocr_math", "rec_know_gen"]
    (data / "llava-mm-vet.jsonl").unlink()
    assert named("mmvet").questions(Place(data)) == asked
    (data / "mm-vet.json").unlink()
    with pytest.raises(ValueError, match=r"llava-mm-vet.jsonl or mm-vet.json is not there"):
        named("mmvet").questions(Place(data))


def test_questions_need_only_llavas_file(data):
    (data / "mm-vet.json").unlink()
    asked = named("mmvet").questions(Place(data))
    assert len(asked) == 5 and asked[0].category == asked[0].truth == ""


def test_the_judge_gets_the_table_and_its_next_line(data, answers):
    asked = named("mmvet").requests(Place(data), official.answers(answers)[0])
    assert [one.id for one in asked] == list("01234") and {one.temperature for one in asked} == {0.0}
    (message,) = asked[0].messages
    assert message == {"role": "user", "content": f"{OWN_PROMPT}\nWhat is x? | -1 <AND> -5 | answer 0 | "}
    assert asked[1].messages[0]["content"].endswith("\nWhich city is this? | Oslo <OR> Kristiania | answer 1 | ")


def test_the_users_prompt_is_sent_if_there_is_one(data, answers, capsys):
    (data / "prompt.txt").write_text("The official words.\na | b | c | 0.5\n")
    with serving(reply=replying) as server:
        found = said("mmvet", data, answers, capsys, *judging(server))
        (told,) = server.requests[0]["messages"]
    assert (
        told["content"].startswith("The official words.\na | b | c | 0.5\n") and found["protocol"] == "llava-official"
    )
    assert told["content"].count("\n") == 2 and OWN_PROMPT[:20] not in told["content"]


def test_grades_are_summed_up_by_ability_and_combination(data, answers, tmp_path, capsys):
    with serving(reply=replying, answers_as="tiny-0314") as server:
        found = said("mmvet", data, answers, capsys, "--out", tmp_path / "out", *judging(server))
    assert found["protocol"] == "llava-official, prompt: vistune"
    assert found["score"] == found["scores"]["total"] == pytest.approx(100 * 2.8 / 5)
    expected = {"rec": 45, "ocr": 70, "know": 70, "gen": 90, "math": 70}
    assert {name: found["scores"][name] for name in expected} == pytest.approx(expected)
    counts = {name: count for name, (count, _) in table(found, "by ability").items()}
    assert counts == {"rec": 2, "ocr": 2, "know": 2, "gen": 1, "math": 2}
    combined = table(found, "by combination of abilities")
    assert next(iter(combined)) == "ocr_math" and combined["ocr_math"] == (2, pytest.approx(70))
    assert combined["rec"] == (1, 0.0) and set(combined) == {"ocr_math", "know", "rec", "rec_know_gen"}
    assert [one["score"] for one in found["items"]] == [1.0, 0.5, 0.0, 0.4, 0.9]
    assert all(one["correct"] is None for one in found["items"])
    assert (found["judge"]["answered_as"], found["judge"]["replies"]) == (["tiny-0314"], 5)
    assert found["subset"] and not found["partial"]
    grades = json.loads((tmp_path / "out" / "mmvet-grades.json").read_text())
    assert grades["v1_1"] == {"model": ["tiny-0314"], "content": ["0.5"], "score": [0.5]}
    assert len(found["submission"]) == 2


def test_what_is_not_read_scores_nothing(data, answers, capsys):
    said_of = {"0": "1.0", "1": "I cannot say.", "2": "8", "3": 400, "4": "0.9"}

    def reply(messages):
        return said_of[messages[-1]["content"].split(" | ")[-2].removeprefix("answer ")]

    with serving(reply=reply) as server:
        found = said("mmvet", data, answers, capsys, *judging(server))
    assert found["scores"]["total"] == pytest.approx(95) and found["scores"]["math"] == 100
    assert (found["answered"], found["partial"], found["score"]) == (2, True, None)
    first, second, third = found["remarks"]["failed"]
    assert first == "1: unreadable: 'I cannot say.'" and second == "2: unreadable: '8'" and "400" in third
    assert "score" not in found["items"][1] and found["items"][1]["content"] == ["I cannot say."]


def test_several_runs_are_averaged(data, answers, tmp_path, monkeypatch):
    benchmark, place, told = named("mmvet"), Place(data), official.answers(answers)[0]
    monkeypatch.setattr(MMVet, "runs", 3)
    seen: list[str] = []

    def reply(messages):
        seen.append(replying(messages))
        return ["1.0", "0.4", "0.7"][seen.count(seen[-1]) - 1]

    with serving(reply=reply) as server:
        judge = Judge(url=server.url, model="tiny", workers=1)
        replies = ask(judge, benchmark.requests(place, told), tmp_path / "judged.jsonl")
        assert server.completions == 15
        assert ask(judge, benchmark.requests(place, told), tmp_path / "judged.jsonl").keys() == replies.keys()
        assert server.completions == 15
    result = benchmark.reviewed(place, told, replies)
    assert result.scores["total"] == pytest.approx(70) and result.answered == 5
    assert [row["total"] for row in result.tables["by run"]] == pytest.approx([100, 40, 70])
    replies["2 #3"] = Reply(error="gone")
    result = benchmark.reviewed(place, told, replies)
    assert result.answered == 5 and result.remarks["failed"] == ["2: gone"]
    assert result.scores["total"] == pytest.approx(70)  # the other two of question 2: 1.0 and 0.4


def test_missing_and_foreign_answers_are_named(data, tmp_path, capsys):
    path = write_answers(tmp_path / "few.jsonl", [{"question_id": i, "text": f"answer {i}"} for i in (4, 0, 99)])
    with serving(reply=replying) as server:
        found = said("mmvet", data, path, capsys, *judging(server))
        assert server.completions == 2
    assert found["remarks"] == {"foreign": ["99"], "missing": ["1", "2", "3"]}
    assert found["partial"] and found["score"] is None and found["scores"]["total"] == pytest.approx(95)
    found = said("mmvet", data, path, capsys)
    assert found["partial"] and found["remarks"]["foreign"] == ["99"]


def test_a_judge_needs_the_right_answers(data, answers, capsys):
    facts = json.loads((data / "mm-vet.json").read_text())
    del facts["v1_2"]
    (data / "mm-vet.json").write_text(json.dumps(facts))
    with serving() as server:
        assert "question 2 is not in mm-vet.json" in refused("mmvet", data, answers, capsys, *judging(server))
        (data / "mm-vet.json").write_text('{"v1_0": {"question": "?"}}')
        assert "mm-vet.json:v1_0: answer is missing" in refused("mmvet", data, answers, capsys, *judging(server))
        (data / "mm-vet.json").unlink()
        assert "mm-vet.json is not there" in refused("mmvet", data, answers, capsys, *judging(server))
        assert not server.completions


def test_grades_made_elsewhere_are_summed_up(data, answers, tmp_path, capsys):
    with serving(reply=replying) as server:
        here = said("mmvet", data, answers, capsys, "--out", tmp_path / "out", *judging(server))
        path = tmp_path / "out" / "mmvet-grades.json"
        there = said("mmvet", data, path, capsys, "--out", tmp_path / "other")
        assert (there["scores"], there["tables"]) == (here["scores"], here["tables"]) and not there["submission"]
        assert "without --judge" in refused("mmvet", data, path, capsys, *judging(server))
    grades = json.loads(path.read_text())
    grades["v1_0"] |= {"content": ["good"], "score": [0.0]}  # what the official scorer does with a reply of no number
    path.write_text(json.dumps(grades, indent=4))
    found = said("mmvet", data, path, capsys)
    assert found["scores"]["total"] == found["score"] == pytest.approx(100 * 1.8 / 5)
    assert found["scores"]["total_without_failed"] == pytest.approx(100 * 1.8 / 4)
    assert found["remarks"]["failed"] == ["0: 'good'"]
    del grades["v1_4"]
    path.write_text(json.dumps(grades))
    found = said("mmvet", data, path, capsys)
    assert found["partial"] and found["remarks"]["missing"] == ["4"] and found["score"] is None
    path.write_text('{"v1_0": {"score": "1.0"}}')
    assert "v1_0: no grades" in refused("mmvet", data, path, capsys)


def test_grades_of_several_runs_are_averaged(tmp_path, capsys):
    path = tmp_path / "grades.json"
    path.write_text(json.dumps({f"v1_{i}": {"score": [0.0, i / 4], "content": ["0.0", f"{i / 4}"]} for i in range(5)}))
    found = said("mmvet", tmp_path, path, capsys)
    assert found["scores"] == {"total": pytest.approx(25)} and list(found["tables"]) == ["by run"]
    assert [row["total"] for row in found["tables"]["by run"]] == pytest.approx([0, 50])


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.5", 0.5),
        (" 1.0\n", 1.0),
        ("0", 0.0),
        ("1", 1.0),
        (".5", 0.5),
        ("0.7 | next question", 0.7),
        ("0.3\nWhat is y? | 4", 0.3),
        ("0.8.", 0.8),
        ("| 0.2 |", 0.2),
        ("**0.6**", 0.6),
        ("Correctness: 0.4", 0.4),
        ("Score: .5", 0.5),
        ("Correctness score = 1.0", 1.0),
        ("8", None),
        ("1/10", None),
        ("1 / 10", None),
        ("1 out of 10", None),
        ("-0.1", None),
        ("1.1", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        ("   ", None),
        ("The answer is right: 1.0", None),
        ("Score: 80", None),
        ("half", None),
    ],
)
def test_grades_are_read(reply, grade):
    assert parse_grade(reply) == grade


@given(st.text())
def test_any_reply_is_read_or_not(reply):
    grade = parse_grade(reply)
    assert grade is None or 0 <= grade <= 1


@given(st.floats(0, 1), st.text())
@example(0.0, "%")
def test_a_number_is_read_whatever_follows(grade, more):
    assert parse_grade(f"{grade!r}\n{more}") == grade
