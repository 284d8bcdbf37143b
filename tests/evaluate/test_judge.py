"""The judge behind an endpoint on loopback: asked once, kept, retried, counted; and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate.openai_server import Messages, serving
from vistune.evaluate import judge as room
from vistune.evaluate.judge import Judge, JudgeRefused, Request, ask, told


def judge(url: str, **more) -> Judge:
    return Judge(**{"url": url, "model": "tiny", "key": "VISTUNE_TEST_KEY", "timeout": 5.0, "tries": 4} | more)


def request(id: str, words: str = "", **more) -> Request:
    return Request(id=id, messages=({"role": "user", "content": words or f"question {id}"},), **more)


def lines(cache: Path) -> list[dict]:
    return [json.loads(line) for line in cache.read_text().splitlines()]


def test_replies_come_by_id_and_are_asked_once(tmp_path):
    cache = tmp_path / "deep" / "judged.jsonl"
    wanted = [request(str(i), temperature=0.2, max_tokens=9) for i in range(12)]
    with serving(answers_as="tiny-0314") as server:
        first = ask(judge(server.url), wanted, cache)
        again = ask(judge(server.url), wanted[::-1], cache)
        assert server.completions == 12
    assert {id: reply.text for id, reply in first.items()} == {str(i): f"question {i}" for i in range(12)}
    assert list(again) == [str(i) for i in reversed(range(12))]
    assert {id: reply.text for id, reply in again.items()} == {id: reply.text for id, reply in first.items()}
    assert all(reply.model == "tiny-0314" and reply.date.startswith("20") for reply in first.values())
    assert not any(reply.cached for reply in first.values()) and all(reply.cached for reply in again.values())
    sent = server.requests[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("tiny", 0.2, 9)
    kept = lines(cache)[0]
    assert kept["messages"] == sent["messages"] and kept["usage"] == {"prompt_tokens": 7, "completion_tokens": 3}


def test_the_cache_tells_apart_whatever_changes_a_reply(tmp_path):
    one, cache = request("a", "same"), tmp_path / "judged.jsonl"
    others = [
        request("b", "same"),  # the same words: the same reply
        request("c", "same", temperature=0.2),
        request("d", "same", max_tokens=3),
        request("e", "same", run=1),
        request("f", "other"),
    ]
    with serving(models=["tiny", "big"]) as server:
        ask(judge(server.url), [one, *others], cache)
        assert server.completions == 5
        ask(judge(server.url, model="big"), [one], cache)
        assert server.completions == 6
        ask(judge(server.url, timeout=9.0, workers=1), [one, *others], cache)
        assert server.completions == 6


def test_a_killed_run_goes_on_where_it_was(tmp_path, capsys):
    cache = tmp_path / "judged.jsonl"
    wanted = [request(str(i)) for i in range(6)]
    with serving() as server:
        whole = ask(judge(server.url), wanted, cache)
        text = cache.read_bytes()
        cache.write_bytes(text[: len(text) - 40])  # the last line is torn
        again = ask(judge(server.url), wanted, cache)
        assert server.completions == 7
        assert "1 lines are no replies" in capsys.readouterr().err
        assert {id: reply.text for id, reply in again.items()} == {id: reply.text for id, reply in whole.items()}
        ask(judge(server.url), wanted, cache)
        assert server.completions == 7


def test_what_came_before_a_crash_is_kept(tmp_path, monkeypatch):
    cache, seen = tmp_path / "judged.jsonl", []

    def dies_at_the_fourth(row):
        seen.append(row)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return reply(row)

    reply = room._reply
    with serving() as server:
        monkeypatch.setattr(room, "_reply", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            ask(judge(server.url, workers=1), [request(str(i)) for i in range(8)], cache)
        assert len(lines(cache)) == 3
        monkeypatch.setattr(room, "_reply", reply)
        replies = ask(judge(server.url), [request(str(i)) for i in range(8)], cache)
    assert sum(one.cached for one in replies.values()) == 3 and len(replies) == 8


def test_workers_ask_at_once(tmp_path):
    with serving(delay=0.05) as server:
        ask(judge(server.url, workers=3), [request(str(i)) for i in range(9)], tmp_path / "judged.jsonl")
    assert server.most == 3


@pytest.mark.parametrize("statuses", [[429, 500], [503, 502, 429], [408]])
def test_a_busy_server_is_asked_again(tmp_path, statuses):
    with serving(statuses=list(statuses)) as server:
        replies = ask(judge(server.url), [request("0")], tmp_path / "judged.jsonl")
        assert replies["0"].text == "question 0" and server.completions == len(statuses) + 1


def test_a_dropped_connection_is_asked_again(tmp_path):
    with serving(drops=1) as server:
        assert ask(judge(server.url), [request("0")], tmp_path / "judged.jsonl")["0"].text == "question 0"


def test_tries_end(tmp_path):
    def reply(messages: Messages) -> str | int:
        return 500 if messages[-1]["content"] == "question 1" else "8 7"

    with serving(reply=reply) as server:
        replies = ask(judge(server.url), [request(str(i)) for i in range(3)], tmp_path / "judged.jsonl")
        assert server.completions == 2 + 4
    assert "500" in replies["1"].error and not replies["1"].text
    assert replies["0"].text == replies["2"].text == "8 7"


def test_a_failure_is_asked_again_next_time(tmp_path):
    cache = tmp_path / "judged.jsonl"
    with serving(reply=lambda messages: 400 if messages[-1]["content"] == "question 1" else "fine") as server:
        first = ask(judge(server.url), [request("0"), request("1")], cache)
        assert first["1"].error and len(lines(cache)) == 1
        server.reply = lambda messages: "mended"
        again = ask(judge(server.url), [request("0"), request("1")], cache)
    assert again["0"].text == "fine" and again["0"].cached
    assert again["1"].text == "mended" and not again["1"].cached


def test_a_slow_server_is_a_failure_not_a_wait_without_end(tmp_path):
    with serving() as server:
        cache = tmp_path / "judged.jsonl"
        ask(judge(server.url), [request("0")], cache)
        server.delay = 1.0
        with pytest.raises(ValueError, match="timed out"):
            ask(judge(server.url, timeout=0.05, tries=1), [request("0"), request("1")], tmp_path / "other.jsonl")


def test_empty_replies_are_failures(tmp_path):
    said = {"question 0": None, "question 1": "", "question 2": "8 7"}
    with serving(reply=lambda messages: said[messages[-1]["content"]], finish="length") as server:
        replies = ask(judge(server.url), [request(str(i)) for i in range(3)], tmp_path / "judged.jsonl")
    assert "length" in replies["0"].error and "length" in replies["1"].error and replies["2"].text == "8 7"


def test_replies_are_kept_as_they_are_but_for_what_was_thought_aloud(tmp_path):
    said = {
        "question 0": " 8 7\n",
        "question 1": "<think>\nHm.\n9 9\n</think>\n\n8 7\nwell",
        "question 2": "8 <think>7",
    }
    cache = tmp_path / "judged.jsonl"
    wanted = [request(str(i)) for i in range(3)]
    with serving(reply=lambda messages: said[messages[-1]["content"]]) as server:
        for replies in (ask(judge(server.url), wanted, cache), ask(judge(server.url), wanted, cache)):
            assert [replies[id].text for id in "012"] == [" 8 7\n", "8 7\nwell", "8 <think>7"]
    assert {row["reply"] for row in lines(cache)} == set(said.values())


def test_a_judge_that_stops_answering_is_given_up(tmp_path):
    with serving() as server:
        cache = tmp_path / "judged.jsonl"
        ask(judge(server.url), [request("0")], cache)
        server.reply = lambda messages: 400
        replies = ask(judge(server.url, workers=1), [request(str(i)) for i in range(40)], cache)
        assert server.completions < 20
    assert replies["0"].text and sum(bool(one.error) for one in replies.values()) == 39
    assert "not asked" in replies["39"].error


def test_a_server_that_wants_the_other_word_for_the_longest_reply(tmp_path):
    def reply(messages: Messages) -> str | int:
        return "8 7" if "max_completion_tokens" in server.requests[-1] else 400

    says = {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}
    with serving(error=says, reply=reply) as server:
        replies = ask(judge(server.url, workers=1), [request(str(i)) for i in range(4)], tmp_path / "judged.jsonl")
        assert {one.text for one in replies.values()} == {"8 7"} and server.completions == 5


def nothing_there(cache: Path) -> bool:
    return not cache.exists() or not cache.read_bytes()


def test_a_refused_key_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("VISTUNE_TEST_KEY", "sesame")
    cache = tmp_path / "judged.jsonl"
    with serving(key="another") as server:
        with pytest.raises(JudgeRefused, match="the key in VISTUNE_TEST_KEY is refused") as error:
            ask(judge(server.url), [request(str(i)) for i in range(9)], cache)
        assert server.completions == 1 and nothing_there(cache)
        assert "\n" not in str(error.value) and "sesame" not in str(error.value)
        server.key = "sesame"
        assert ask(judge(server.url), [request("0")], cache)["0"].text == "question 0"


def test_an_unknown_model_is_one_sentence(tmp_path):
    with serving() as server:
        with pytest.raises(JudgeRefused, match="no model gpt there, or the URL"):
            ask(judge(server.url, model="gpt"), [request(str(i)) for i in range(9)], tmp_path / "judged.jsonl")
        assert server.completions == 1


def test_nobody_there_is_one_sentence(tmp_path):
    with serving() as server:
        url = server.url
    with pytest.raises(JudgeRefused, match="is that its address"):
        ask(judge(url, tries=1), [request("0")], tmp_path / "judged.jsonl")


def test_a_used_up_quota_is_one_sentence(tmp_path):
    empty = {"code": "insufficient_quota"}
    with serving(reply=lambda messages: 429, error=empty) as server, pytest.raises(JudgeRefused, match="is used up"):
        ask(judge(server.url, tries=2), [request("0")], tmp_path / "judged.jsonl")


def test_a_refusal_does_not_tell_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("VISTUNE_TEST_KEY", "sesame")
    says = {"message": "wrong: sesame"}
    with serving(reply=lambda messages: 403, error=says) as server, pytest.raises(JudgeRefused) as error:
        ask(judge(server.url), [request("0")], tmp_path / "judged.jsonl")
    assert "wrong: ***" in str(error.value) and "sesame" not in str(error.value)


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_what_is_no_chat_completion_is_a_failure(tmp_path, kind):
    with serving() as server:
        cache = tmp_path / "judged.jsonl"
        ask(judge(server.url), [request("0")], cache)
        server.raw = (kind, b"<html>Welcome</html>")
        replies = ask(judge(server.url, tries=1), [request("0"), request("1")], cache)
    assert replies["0"].text and replies["1"].error.startswith("no chat completion")


def test_not_one_reply_is_one_sentence(tmp_path):
    with serving(reply=lambda messages: 400) as server:
        with pytest.raises(JudgeRefused, match="not one reply; Error code: 400"):
            ask(judge(server.url), [request(str(i)) for i in range(40)], tmp_path / "judged.jsonl")
        assert server.completions < 20


def test_a_key_is_wanted_away_from_loopback(tmp_path, monkeypatch):
    monkeypatch.delenv("VISTUNE_TEST_KEY", raising=False)
    with pytest.raises(JudgeRefused, match="VISTUNE_TEST_KEY is not set"):
        ask(judge("https://judge.example/v1"), [request("0")], tmp_path / "judged.jsonl")
    with serving() as server:
        ask(judge(server.url), [request("0")], tmp_path / "judged.jsonl")
        assert server.keys[0].startswith("Bearer ") and len(server.keys[0]) > len("Bearer ")
        monkeypatch.setenv("VISTUNE_TEST_KEY", "sesame")
        ask(judge(server.url), [request("1")], tmp_path / "judged.jsonl")
        assert server.keys[1] == "Bearer sesame"


def test_a_cache_alone_needs_no_judge(tmp_path, monkeypatch):
    cache, wanted = tmp_path / "judged.jsonl", [request("0")]
    with serving() as server:
        ask(judge(server.url), wanted, cache)
    assert ask(judge("https://judge.example/v1"), wanted, cache)["0"].text == "question 0"


def test_scores_say_who_judged_and_when(tmp_path):
    cache = tmp_path / "judged.jsonl"
    with serving(answers_as="tiny-0314") as server:
        ask(judge(server.url), [request("0")], cache)
        cache.write_text(cache.read_text().replace('"date": "20', '"date": "19'))
        server.answers_as = "tiny-0613"
        server.reply = lambda messages: 400 if messages[-1]["content"] == "question 2" else "fine"
        by = judge(server.url.replace("//", "//name:word@"), workers=1)
        found = told(by, ask(judge(server.url), [request(str(i)) for i in range(3)], cache))
    assert found["answered_as"] == ["tiny-0314", "tiny-0613"]
    assert (found["replies"], found["failed"], found["cached"]) == (2, 1, 1)
    assert found["first"].startswith("19") and found["last"].startswith("20")
    assert (found["prompt_tokens"], found["completion_tokens"]) == (14, 6)
    assert "word" not in told(by, {})["url"] and told(by, {})["first"] == ""
