"""A server as the one who answers: what it is sent, what becomes of its failures, an evaluation through it."""

from __future__ import annotations

import base64
import io
from itertools import count
from pathlib import Path

import PIL.Image
import pytest

from tests.evaluate.asked import rows, settings, toys_in
from tests.evaluate.openai_server import serving
from vistune.evaluate.items import Question
from vistune.evaluate.remote import Remote, data_url, parts
from vistune.evaluate.run import evaluate
from vistune.samples import Image


@pytest.fixture
def pictures(tmp_path):
    made = []
    for kind in ("png", "jpg", "gif"):
        PIL.Image.new("RGB", (9, 7), (200, 30, 60)).save(tmp_path / f"a.{kind}")
        made.append(Image(path=str(tmp_path / f"a.{kind}")))
    return made


def said(remote, questions, tokens=5):
    return dict(remote.answer(questions, tokens))


def test_pictures_go_out_in_their_own_bytes(pictures):
    for picture, kind in zip(pictures, ("png", "jpeg", "png"), strict=True):
        head, _, encoded = data_url(picture).partition(",")
        assert head == f"data:image/{kind};base64"
        sent, own = base64.b64decode(encoded), Path(picture.path).read_bytes()
        assert (sent == own) is (not picture.path.endswith("gif"))
        assert PIL.Image.open(io.BytesIO(sent)).size == (9, 7)
    inside = Image(path=pictures[0].path, data=Path(pictures[1].path).read_bytes())
    assert data_url(inside) == data_url(pictures[1])


def test_a_turn_has_its_pictures_where_their_marks_are(pictures):
    turn = parts("Is <image>\nlike <image>?", pictures[:2])
    assert [part["type"] for part in turn] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in turn if part["type"] == "text"] == ["Is ", "like ", "?"]
    assert parts("an <image> mark\n", []) == [{"type": "text", "text": "an <image> mark\n"}]
    with pytest.raises(ValueError, match="1 images for 2"):
        parts("<image> <image>", pictures[:1])


def test_requests_side_by_side_greedy_and_in_place(pictures):
    questions = [Question(id=i, text=f"number {i}", images=(pictures[i % 3],)) for i in range(20)]
    with serving(delay=0.02, models=["first", "second"]) as server:
        found = said(Remote(server.url, batch=4), questions)
        assert {i: one.text for i, one in found.items()} == {i: f"number {i}" for i in range(20)}
        assert found[0].tokens == 3 and found[0].margin is None
        assert 1 < server.most <= 4
        asked = server.requests[0]
        assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("first", 0, 5)
        assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url", "text"]
        said(Remote(server.url, "second"), questions[:1])
        assert server.requests[-1]["model"] == "second"


def test_what_passes_is_tried_again_and_what_one_question_causes_is_its_own(pictures):
    questions = [Question(id=i, text=f"number {i}") for i in range(6)]
    with serving(statuses=[503, 429, 500]) as server:
        assert not any(one.error for one in said(Remote(server.url, batch=1), questions).values())
        assert server.completions == 9
    numbers = count()
    with serving(reply=lambda messages: 400 if next(numbers) == 2 else "fine") as server:
        found = said(Remote(server.url, batch=1), questions)
        assert [i for i, one in found.items() if one.error] == [2] and "400" in found[2].error
        lost = said(Remote(server.url), [Question(id=1, text="?", images=(Image(path="/nowhere.png"),))])
        assert "no such file" in lost[0].error
    with serving(reply=lambda messages: None) as server:
        assert "without text" in said(Remote(server.url), questions[:1])[0].error


def test_a_server_that_has_another_word_for_the_longest_answer():
    with serving(error={"message": "use max_completion_tokens"}) as server:
        server.reply = lambda messages: 400 if "max_tokens" in server.requests[-1] else "fine"
        found = said(Remote(server.url, batch=1), [Question(id=i, text="?") for i in range(3)])
        assert [one.text for one in found.values()] == ["fine"] * 3
        assert server.completions == 4 and server.requests[-1]["max_completion_tokens"] == 5


def test_a_server_that_is_not_there_or_refuses_is_one_sentence(monkeypatch):
    question = [Question(id=1, text="?")]
    with serving(key="secret") as server:
        with pytest.raises(ValueError, match=r"refuses the key \(401\).*--key") as told:
            said(Remote(server.url, "tiny", key="NO_SUCH_KEY"), question)
        assert "\n" not in str(told.value) and "goes on from there" in str(told.value)
        monkeypatch.setenv("A_KEY", "secret")
        assert said(Remote(server.url, key="A_KEY"), question)[0].text == "?"
        with pytest.raises(ValueError, match="no such model"):
            said(Remote(server.url, "other", key="A_KEY"), question)
        url = server.url
    with serving(models=[]) as server, pytest.raises(ValueError, match="lists no model"):
        Remote(server.url)
    with pytest.raises(ValueError, match="is the server up"):
        Remote(url)


def test_an_evaluation_through_a_server_is_gone_on_with(tmp_path):
    data, numbers = toys_in(tmp_path / "data", "pope"), count()
    with serving(reply=lambda messages: "Yes." if next(numbers) < 5 else 401) as server:
        with pytest.raises(ValueError, match="What was answered is kept"):
            evaluate(server.url, ["pope"], data, tmp_path / "out", settings(batch=1, max_new_tokens=0))
        server.reply = lambda messages: "Yes."
        found = evaluate(server.url, ["pope"], data, tmp_path / "out", settings(batch=3, max_new_tokens=0))
        assert found["answers"] == 7 and found["precision"] == "as served" and found["served"] == "tiny"
        assert server.requests[-1]["max_tokens"] == 128
        scores = found["benchmarks"]["pope"]["scores"]
        assert scores["random_recall"] == 1 and scores["random_yes_ratio"] == 1
        assert {row["model_id"] for row in rows(tmp_path / "out", "pope")} == {"tiny"}
        server.models = ["another"]
        with pytest.raises(ValueError, match="served was 'tiny', now 'another'"):
            evaluate(server.url, ["pope"], data, tmp_path / "out", settings(batch=1, max_new_tokens=0))
