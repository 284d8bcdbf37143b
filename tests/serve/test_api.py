"""The interface over HTTP, its engine scripted: statuses, streams, what happens when somebody goes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import tracemalloc

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.scripted import Scripted, application, says, staged, waits
from tests.serve.served import picture, shows, until
from vistune.models.load import load
from vistune.serve.interface import api, completions, preparing, wire
from vistune.serve.refused import Refused
from vistune.serve.work import Ended, Piece, State

HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded(start):
    return load(start)


def post(stage, body=None, **fields):
    return stage.client.post(PATH, json=(body or HI) | fields)


def events(text):
    """What the events of a stream say; comments left out."""
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]


def error_of(response, status):
    """The error of an answer, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json" and body["error"]["message"]
    return body["error"]


def test_whole_answers(loaded):
    with staged(loaded, says("A ", "", "cup", reason="length")) as stage:
        answer = post(stage).json()
        choice = answer["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "A cup", "refusal": None}
        assert choice["finish_reason"] == "length" and answer["object"] == "chat.completion" and answer["model"] == "m"
        assert answer["id"].startswith("chatcmpl-") and abs(answer["created"] - time.time()) < 60
        prompt = len(stage.engine.tickets[0].work.ids)
        assert answer["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": 3,
            "total_tokens": prompt + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def test_streams(loaded):
    with staged(loaded, says("A ", "Täs\n\nse", "☕")) as stage:
        response = post(stage, stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
        *chunks, last = events(response.text)
        assert last == "[DONE]"
        found = [json.loads(chunk) for chunk in chunks]
        assert len({(one["id"], one["created"], one["system_fingerprint"]) for one in found}) == 1
        assert all(one["object"] == "chat.completion.chunk" and one["usage"] is None for one in found[:-1])
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in found[:-1]) == "A Täs\n\nse☕"
        assert [one["choices"][0]["finish_reason"] for one in found[-3:-1]] == [None, "stop"]
        assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 3
        plain = events(post(stage, stream=True).text)
        assert plain[-1] == "[DONE]" and not any("usage" in chunk for chunk in plain)


def test_settings_reach_the_engine(loaded):
    with staged(loaded, says("a"), new_tokens=100, new_tokens_unasked=50) as stage:
        asked = {"temperature": 0.3, "top_p": 0.5, "seed": -7, "max_tokens": 9, "stop": ["##", "\n"]}
        post(stage, **asked)
        work = stage.engine.tickets[-1].work
        drawn = work.settings
        assert (drawn.temperature, drawn.top_p, drawn.seed, drawn.max_new_tokens) == (0.3, 0.5, -7, 9)
        assert work.stops == ("##", "\n") and 0 < work.until - time.monotonic() <= 300
        post(stage)
        post(stage)
        one, other = (ticket.work.settings for ticket in stage.engine.tickets[-2:])
        assert (one.temperature, one.top_p, one.max_new_tokens) == (1.0, 1.0, 50) and one.seed != other.seed
        post(stage, temperature=0)
        assert stage.engine.tickets[-1].work.settings.temperature == 0
        wrong = error_of(post(stage, max_completion_tokens=101), 400)
        assert wrong["param"] == "max_completion_tokens" and "100" in wrong["message"]


def test_models(loaded):
    with staged(loaded, says("a")) as stage:
        listed = stage.client.get("/v1/models").json()
        assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["m"]
        assert listed["data"][0] == stage.client.get("/v1/models/m").json()
        about = listed["data"][0]
        assert (about["context"], about["template"], about["pictures"]) == (2048, "v1", True)
        assert error_of(stage.client.get("/v1/models/a/b"), 404)["code"] == "model_not_found"
        wrong = error_of(post(stage, model="gpt"), 404)
        assert wrong["param"] == "model" and "m" in wrong["message"] and wrong["code"] == "model_not_found"


def test_addresses_methods_and_types(loaded):
    with staged(loaded, says("a")) as stage:
        for path in ("/nothing", "/docs", "/redoc", "/openapi.json", "/v1", "/v1/completions", PATH + "/"):
            error_of(stage.client.get(path), 404)
        wrong = stage.client.get(PATH)
        assert error_of(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["allow"] == "POST"
        error_of(stage.client.post("/v1/models", json={}), 405)
        for headers in ({"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {}):
            error_of(stage.client.post(PATH, content=json.dumps(HI), headers=headers), 415)
        charset = {"content-type": "Application/JSON; charset=utf-8"}
        assert stage.client.post(PATH, content=json.dumps(HI), headers=charset).status_code == 200
        assert error_of(stage.client.post(PATH, content="{", headers=charset), 400)["code"] == "invalid_json"
        assert len(stage.engine.tickets) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_the_first_word_has_its_status(loaded, stream):
    def fails(ticket):
        ticket.hear(Ended(reason="error", error=Refused(503, "out of memory", code="memory", retry_after=3)))

    with staged(loaded, fails) as stage:
        response = post(stage, stream=stream)
        assert error_of(response, 503)["code"] == "memory" and response.headers["retry-after"] == "3"
        stage.engine.submit = lambda *_: (_ for _ in ()).throw(Refused(429, "busy", code="queue_full", retry_after=0.2))
        response = post(stage, stream=stream)
        assert error_of(response, 429)["type"] == "rate_limit_error" and response.headers["retry-after"] == "1"


def test_what_fails_later_is_an_event_and_no_end(loaded):
    failure = Ended(reason="error", tokens=1, error=Refused(503, "the server stops", code="stopping"))

    def fails(ticket):
        ticket.hear(Piece("A", 1))
        time.sleep(0.05)  # so that the stream has begun; what is said does not depend on it
        ticket.hear(failure)

    with staged(loaded, fails) as stage:
        *_, last = events(post(stage, stream=True).text)
        assert json.loads(last) == failure.error.body()
        assert error_of(post(stage), 503)["code"] == "stopping"


def test_an_answer_that_was_broken_off_is_no_whole_one(loaded):
    with staged(loaded, says("A", reason="left")) as stage:
        assert error_of(post(stage), 503)["code"] == "stopped"
        assert "[DONE]" not in post(stage, stream=True).text


@pytest.mark.slow
def test_silence_is_filled_and_has_an_end(loaded, monkeypatch):
    monkeypatch.setattr(completions, "HELD_BACK", 0.05)
    monkeypatch.setattr(completions, "ALIVE", 0.05)
    monkeypatch.setattr(completions, "GRACE", 0.0)
    with staged(loaded, waits(), deadline=3.0) as stage:
        text = post(stage, stream=True).text
        assert ": waiting\n\n" in text and json.loads(events(text)[-1])["error"]["code"] == "deadline"
        assert error_of(post(stage), 504)["code"] == "deadline"
        assert all(ticket.gone.wait(5) for ticket in stage.engine.tickets)


def talking(url, stream):
    """A connection on which a request was sent."""
    return talking_of(url, HI | {"stream": stream})


def talking_of(url, body):
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(head.encode() + data)
    return connection


def heard(connection, words):
    """Returns when these have come."""
    said = b""
    while words not in said:
        said += (more := connection.recv(4096))
        assert more, said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("texts", [(), ("A",)])
def test_who_goes_leaves(loaded, stream, texts):
    with staged(loaded, waits(*texts)) as stage:
        with talking(stage.url, stream) as connection:
            assert until(lambda: stage.engine.tickets)
            if stream and texts:
                heard(connection, b"chat.completion.chunk")
            assert not stage.engine.tickets[0].gone.is_set()
        assert stage.engine.tickets[0].gone.wait(5)
        assert until(lambda: not stage.app.open)
        text = stage.client.get("/metrics").text
        assert 'vistune_requests_total{model="m",reason="left"} 1.0' in text
        assert 'vistune_requests_in_flight{model="m"} 0.0' in text


def test_who_goes_while_pictures_are_read_is_not_prepared(loaded, monkeypatch):
    began, go_on, seen = threading.Event(), threading.Event(), []
    whole = preparing.shown

    def slow(*given):
        began.set()
        seen.append(1)
        assert go_on.wait(10)
        return whole(*given)

    monkeypatch.setattr(preparing, "shown", slow)
    with staged(loaded, says("a")) as stage:
        body = {"model": "m", "messages": [shows("a", *[picture(i) for i in range(4)])]}
        with pytest.raises(httpx.ReadTimeout):
            stage.client.post(PATH, json=body, timeout=httpx.Timeout(10, read=0.3))
        assert began.wait(5) and until(lambda: not stage.app.open)
        go_on.set()
        assert until(lambda: stage.engine.now is not None and len(seen) == 1) and not stage.engine.tickets


@pytest.mark.parametrize("waiting", [4, 9])
def test_no_picture_is_decoded_for_who_is_told_to_come_again(loaded, monkeypatch, waiting):
    monkeypatch.setattr(preparing, "shown", lambda *_: pytest.fail("decoded"))
    with staged(loaded, says("a"), queue=2, rows=4) as stage:
        stage.engine.now = State(running=2, waiting=waiting)
        response = post(stage, {"model": "m", "messages": [shows("a", picture())]})
        assert error_of(response, 429)["code"] == "queue_full" and int(response.headers["retry-after"]) >= 1
        stage.engine.now = State(alive=False)
        assert error_of(post(stage), 503)["code"] == "engine_dead"


def test_requests_that_are_being_made_ready_count_as_waiting(loaded, monkeypatch):
    go_on, whole = threading.Event(), api.prepare
    monkeypatch.setattr(api, "prepare", lambda *given: (go_on.wait(10), whole(*given))[1])
    found = []
    with staged(loaded, says("a"), queue=1, rows=1) as stage:
        threads = [threading.Thread(target=lambda: found.append(post(stage).status_code)) for _ in range(6)]
        for thread in threads:
            thread.start()
        assert until(lambda: len(found) == 4)
        go_on.set()
        for thread in threads:
            thread.join(10)
    assert sorted(found) == [200, 200, 429, 429, 429, 429]


def test_a_fault_of_our_own_has_a_number_and_no_contents(loaded, monkeypatch, capfd):
    def fault(*_):
        raise RuntimeError("s3cr3t of the request")

    monkeypatch.setattr(api, "prepare", fault)
    with staged(loaded, says("a")) as stage:
        wrong = error_of(post(stage), 500)
    log = "".join(capfd.readouterr())
    number = wrong["message"].split()[-1]
    assert wrong["type"] == "server_error" and len(number) == 8
    assert number in log and "RuntimeError" in log and "test_api.py" in log
    assert "s3cr3t" not in log + json.dumps(wrong)


def test_large_bodies_are_read_in_a_thread(loaded, monkeypatch):
    whole, where = wire.read, []
    monkeypatch.setattr(wire, "read", lambda body: (where.append(threading.current_thread()), whole(body))[1])
    with staged(loaded, says("a")) as stage:
        assert post(stage).status_code == 200
        loop = where.pop()
        big = {"model": "m", "messages": [{"role": "user", "content": "a " * 60_000}]}
        assert error_of(post(stage, big), 400)["code"] == "context_length_exceeded"
        assert where.pop() is not loop


@pytest.mark.slow
def test_what_a_request_came_in_is_let_go_of(loaded):
    body = {"model": "m", "messages": [shows("a", picture(0, (1200, 900)))], "stream": True}  # 4 MB
    loaded.encoder.make_ready(whole=False)  # it keeps words in tables of a fixed size
    with staged(loaded, waits("A")) as stage:
        tracemalloc.start()
        sent = []
        try:
            before = tracemalloc.get_traced_memory()[0]
            sent += [talking_of(stage.url, body) for _ in range(3)]
            assert until(lambda: len(stage.engine.tickets) == 3, 20)
            for one in sent:
                heard(one, b"chat.completion.chunk")
            assert until(lambda: tracemalloc.get_traced_memory()[0] - before < 2_000_000)
            assert tracemalloc.get_traced_memory()[1] - before > 10_000_000
        finally:
            tracemalloc.stop()
            for one in sent:
                one.close()


KEYS = [*wire.Asked.model_fields, "top_k", "type", "text", "role", "content", "url", "image_url", "\x00", "é"]
WORDS = [
    "user",
    "system",
    "assistant",
    "text",
    "image_url",
    "m",
    "data:image/png;base64,AAAA",
    "<image>",
    "",
    "\ud7ff",
    "auto",
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text(max_size=5) | anything}
)
others = {key: anything for key in KEYS if key != "messages"}
request = st.dictionaries(st.sampled_from(KEYS), anything, max_size=4) | st.fixed_dictionaries(
    {"messages": st.lists(message, min_size=1, max_size=3)}, optional=others
)


@pytest.fixture(scope="module")
def inside(loaded):
    """The application itself, in a loop that goes on from one example to the next."""
    app = application(Scripted(loaded, says("a")))
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")
        yield lambda body: runner.run(
            client.post(PATH, content=json.dumps(body), headers={"content-type": "application/json"})
        )


@settings(max_examples=30, deadline=None)
@given(body=request)
def test_any_json_gets_an_answer_or_a_reason(inside, body):
    response = inside(body)
    if response.status_code != 200:
        assert error_of(response, response.status_code) and 400 <= response.status_code < 500
    elif response.headers["content-type"] == "application/json":
        assert response.json()["choices"][0]["message"]["content"] == "a"
    else:
        assert events(response.text)[-1] == "[DONE]"
