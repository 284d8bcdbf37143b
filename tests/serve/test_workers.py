"""The process in front of several workers: who is asked, what is passed on, what clients see when a worker dies."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.served import listening, until
from vistune.serve.door.options import Options, guarded
from vistune.serve.limits import Limits
from vistune.serve.workers.front import Front
from vistune.serve.workers.merged import merged
from vistune.serve.workers.worker import Body, Worker


class Stub:
    """A server on a Unix socket that does what a path says, and remembers what it was asked."""

    def __init__(self, number: int):
        self.number = number
        self.asked: list[tuple[str, bytes, dict[str, str], bytes]] = []
        self.full = False
        self.cancelled = self.sent = 0
        self.go = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["method"], scope["raw_path"] + b"?" + scope["query_string"], headers, body))
        path = scope["path"].strip("/").replace("/", "_") or "page"
        if self.full and path != "metrics":
            await _whole(send, 429, b'{"error": {"message": "full"}}', ("retry-after", "1"))
        else:
            await getattr(self, f"at_{path}", self.at_page)(receive, send)

    async def at_page(self, receive: Any, send: Any) -> None:
        await _whole(send, 200, json.dumps({"worker": self.number}).encode(), ("x-made-by", str(self.number)))

    async def at_wait(self, receive: Any, send: Any) -> None:
        """Nothing is said until the test says so, or the asker goes."""
        gone = asyncio.ensure_future(receive())
        while not self.go.is_set() and not gone.done():
            await asyncio.sleep(0.005)
        self.cancelled += gone.done()
        gone.cancel()
        await _whole(send, 200, json.dumps({"worker": self.number}).encode())

    async def at_stream(self, receive: Any, send: Any) -> None:
        """Events until the asker goes."""
        await _begin(send, 200, ("content-type", "text/event-stream; charset=utf-8"))
        gone = asyncio.ensure_future(receive())
        while not gone.done() and not self.go.is_set():
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            self.sent += 1
            await asyncio.sleep(0.005)
        self.cancelled += gone.done()
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def at_flood(self, receive: Any, send: Any) -> None:
        await _begin(send, 200, ("content-type", "text/event-stream"))
        for _ in range(4000):
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            self.sent += 1
        await send({"type": "http.response.body", "body": b""})

    async def at_metrics(self, receive: Any, send: Any) -> None:
        text = (
            "# HELP vistune_requests_total Answers.\n# TYPE vistune_requests_total counter\n"
            f'vistune_requests_total{{reason="st}}o\\"p"}} {self.number + 1}.0\n'
            "# HELP vistune_alive Alive.\n# TYPE vistune_alive gauge\nvistune_alive 1.0\n"
        )
        await _whole(send, 200, text.encode(), ("content-type", "text/plain"))

    async def at_receive_heart_beat(self, receive: Any, send: Any) -> None:
        await _whole(send, 200, json.dumps({"exist": self.number != 1}).encode())

    at_die_before = at_wait
    at_die_stream = at_stream

    async def at_die_json(self, receive: Any, send: Any) -> None:
        await _begin(send, 200, ("content-length", "100"))
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        while not self.go.is_set():
            await asyncio.sleep(0.005)

    at_worker_generate_stream = at_die_stream


async def _whole(send: Any, status: int, body: bytes, *headers: tuple[str, str]) -> None:
    await _begin(send, status, *headers)
    await send({"type": "http.response.body", "body": body})


async def _begin(send: Any, status: int, *headers: tuple[str, str]) -> None:
    told = {"content-type": "application/json", **dict(headers)}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in told.items()],
        }
    )


class On:
    """A stub that listens; `cut` ends it with its connections, as a killed process does."""

    def __init__(self, stub: Stub, place: Path):
        self.stub = stub
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(place))
        self.server = uvicorn.Server(uvicorn.Config(stub, log_config=None, lifespan="off"))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert until(lambda: self.server.started)

    def _run(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.server.serve(sockets=[self.listener]))

    def cut(self) -> None:
        def now() -> None:
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            for server in self.server.servers:
                server.close()

        self.loop.call_soon_threadsafe(now)

    def end(self) -> None:
        self.stub.go.set()
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


class Team:
    """Stubs behind a front that listens at `url`."""

    def __init__(self, folder: Path, count: int, into: ExitStack):
        self.stubs = [Stub(number) for number in range(count)]
        self.on = [On(stub, folder / f"{stub.number}.sock") for stub in self.stubs]
        for one in self.on:
            into.callback(one.end)
        self.workers = [Worker(number, folder / f"{number}.sock") for number in range(count)]
        for worker in self.workers:
            worker.ready, worker.state = True, "ready"
        self.front = Front(self.workers)
        self.url = into.enter_context(listening(self.front))
        self.client = into.enter_context(httpx.Client(base_url=self.url, timeout=20))

    def background(self, path: str, body: bytes = b"{}") -> threading.Thread:
        """A request that is open while the test goes on; its answers are put into `answers`."""
        self.answers: list[httpx.Response] = getattr(self, "answers", [])
        thread = threading.Thread(
            target=lambda: self.answers.append(httpx.post(self.url + path, content=body, timeout=20)), daemon=True
        )
        thread.start()
        return thread


@contextmanager
def team(count: int) -> Iterator[Team]:
    folder = Path(tempfile.mkdtemp())  # pytest's own paths are too long for a Unix socket
    with ExitStack() as into:
        into.callback(shutil.rmtree, folder)
        yield Team(folder, count, into)


@pytest.fixture(scope="module")
def shared() -> Iterator[Team]:
    with team(3) as made:
        yield made


@pytest.fixture
def crew(shared: Team) -> Iterator[Team]:
    """Three stubs that nobody asks anything."""
    for stub in shared.stubs:
        stub.asked.clear()
        stub.go.clear()
        stub.full, stub.cancelled, stub.sent = False, 0, 0
    shared.answers = []
    yield shared
    for stub in shared.stubs:
        stub.go.set()
    assert until(lambda: not any(one.busy for one in shared.workers))


def test_the_front_has_no_torch() -> None:
    ask = "import sys, vistune.serve.workers.run; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_a_conversation_that_goes_on_is_asked_of_the_worker_that_knows_it(crew: Team) -> None:
    starts = [bytes([97 + number]) * 20_000 for number in range(4)]
    first = [crew.client.post("/talk", content=start).json()["worker"] for start in starts]
    assert len(set(first)) > 1
    for _ in range(3):
        assert [crew.client.post("/talk", content=start + b"more").json()["worker"] for start in starts] == first


def test_requests_are_spread(crew: Team) -> None:
    threads = [crew.background("/wait") for _ in range(9)]
    assert until(lambda: [len(stub.asked) for stub in crew.stubs] == [3, 3, 3])
    assert [one.busy for one in crew.workers] == [3, 3, 3]
    for stub in crew.stubs:
        stub.go.set()
    for thread in threads:
        thread.join(10)
    assert sorted(answer.json()["worker"] for answer in crew.answers) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_request_is_passed_on_as_it_came(crew: Team) -> None:
    body = bytes(range(256)) * 2000
    headers = {
        "Authorization": "Bearer secret-of-the-front",
        "Origin": "http://page",
        "X-Mine": "kept",
        "Host": "name:8",
    }
    answer = crew.client.post("/v1/a%2Fb%20c?x=%20&y", content=body, headers=headers)
    method, target, told, got = next(stub.asked[0] for stub in crew.stubs if stub.asked)
    assert (method, target, got) == ("POST", b"/v1/a%2Fb%20c?x=%20&y", body)
    assert told["x-mine"] == "kept" and told["host"] == "name:8" and told["content-length"] == str(len(body))
    assert not {"authorization", "origin", "connection"} & set(told)
    assert answer.headers["x-made-by"] == str(answer.json()["worker"])
    assert len(answer.headers.get_list("date")) == len(answer.headers.get_list("server")) == 1


def test_the_guard_stands_in_front(crew: Team) -> None:
    """Keys, hosts and caps are judged before any worker is asked; a prefix is taken away, and each adds its own."""
    options = Options(keys=("a key of the front's",), root_path="/lab/x", log=False)
    guard = guarded(crew.front, Limits(body=1000), options)
    with listening(guard) as url, httpx.Client(base_url=url, timeout=20, verify=False) as client:
        key = {"Authorization": "Bearer a key of the front's"}
        assert client.post("/v1", content=b"{}").status_code == 401
        assert client.get("/ready").status_code == 401 and client.get("/health").status_code == 200
        answer = client.post("/v1", content=b"x" * 1001, headers=key)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
        guard.draining = True
        assert client.post("/v1", content=b"{}", headers=key).status_code == 503
        guard.draining = False
        assert not any(stub.asked for stub in crew.stubs)
        for path in ("/lab/x/v1/y?z", "/v1/y?z"):
            assert client.post(path, content=b"{}", headers=key).status_code == 200
        asked = [one for stub in crew.stubs for one in stub.asked]
        assert [target for _, target, _, _ in asked] == [b"/v1/y?z"] * 2
        assert not any("authorization" in headers for _, _, headers, _ in asked)
    assert guard.open == 0 and guard._held.bytes == 0


def test_what_was_sent_is_not_held_while_the_answer_is(crew: Team) -> None:
    """A question of many pictures, whose answer takes minutes, does not keep them."""
    mark = os.urandom(16) * (1 << 16)
    with crew.client.stream("POST", "/stream", content=mark) as answer:
        assert next(answer.iter_raw())
        assert not [one for one in gc.get_objects() if type(one) is Body and one.data]
        for stub in crew.stubs:
            stub.go.set()


def test_a_body_in_pieces_arrives_whole(crew: Team) -> None:
    answer = crew.client.post("/v1", content=iter([b"a" * 70_000, b"b" * 70_000]))
    assert answer.status_code == 200
    assert next(stub.asked[0] for stub in crew.stubs if stub.asked)[3] == b"a" * 70_000 + b"b" * 70_000


def test_a_stream_comes_as_it_is_made(crew: Team) -> None:
    with crew.client.stream("POST", "/stream", content=b"{}") as answer:
        pieces = answer.iter_raw()
        assert b"data: {}\n\n" in next(pieces)  # while the worker is still at it
        for stub in crew.stubs:
            stub.go.set()
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


@pytest.mark.parametrize("path", ["/stream", "/wait"])
def test_a_client_that_goes_is_gone_for_the_worker_too(crew: Team, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(crew.url.rsplit(":", 1)[1]))) as plug:
        plug.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        assert until(lambda: any(stub.asked for stub in crew.stubs))
        assert path == "/wait" or plug.recv(1000)
    assert until(lambda: sum(stub.cancelled for stub in crew.stubs) == 1, 5)
    assert until(lambda: not any(one.busy for one in crew.workers), 5)


def test_a_client_that_goes_while_it_sends_asks_nobody(crew: Team) -> None:
    with socket.create_connection(("127.0.0.1", int(crew.url.rsplit(":", 1)[1]))) as plug:
        plug.sendall(b"POST /wait HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{}")
    assert crew.client.get("/health").status_code == 200
    assert not any(stub.asked for stub in crew.stubs)


@pytest.mark.slow
def test_a_slow_reader_slows_the_worker(crew: Team) -> None:
    with crew.client.stream("GET", "/flood") as answer:
        pieces = answer.iter_raw(1000)
        next(pieces)
        busy = next(stub for stub in crew.stubs if stub.asked)
        before = -1
        while before != busy.sent:  # until it stands still
            before = busy.sent
            time.sleep(0.1)
        assert busy.sent < 3000, "40 MB lie in buffers"
        assert sum(map(len, pieces)) + 1000 == 40_000_000


def test_what_one_has_no_room_for_another_may_have(crew: Team) -> None:
    crew.stubs[0].full = crew.stubs[1].full = True
    assert {crew.client.post("/v1", content=b"{}").json()["worker"] for _ in range(4)} == {2}
    crew.stubs[2].full = True
    answer = crew.client.post("/v1", content=b"{}")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json() == {"error": {"message": "full"}}


def test_metrics_of_all_have_the_worker_s_number(crew: Team) -> None:
    text = crew.client.get("/metrics").text
    families = {one.name: one for one in text_string_to_metric_families(text)}
    assert families["vistune_requests"].type == "counter"
    found = {one.labels["worker"]: (one.labels["reason"], one.value) for one in families["vistune_requests"].samples}
    assert found == {str(n): ('st}o"p', n + 1.0) for n in range(3)}
    assert {one.labels["worker"]: one.value for one in families["vistune_worker_up"].samples} == {
        "0": 1,
        "1": 1,
        "2": 1,
    }
    assert text.count("# TYPE vistune_alive gauge") == 1 and text.count("vistune_alive{worker=") == 3


def test_merging_keeps_what_only_one_of_them_has() -> None:
    one = "# HELP a A.\n# TYPE a gauge\na 1\n"
    two = '# HELP a A.\n# TYPE a gauge\na{x="1"} 2\n# HELP b B.\n# TYPE b gauge\nb{} 3\n'
    assert merged({"0": one, "1": two}) == (
        '# HELP a A.\n# TYPE a gauge\na{worker="0"} 1\na{worker="1",x="1"} 2\n'
        '# HELP b B.\n# TYPE b gauge\nb{worker="1"} 3\n'
    )
    with pytest.raises(ValueError, match="not a line"):
        merged({"0": "<html>"})


def test_readiness_and_health(crew: Team) -> None:
    assert crew.client.get("/health").json() == {"status": "ok"}
    crew.workers[1].ready, crew.workers[1].state = False, "dead"
    try:
        answer = crew.client.get("/ready")
        assert answer.status_code == 200
        assert answer.json() == {"status": "ready", "workers": {"0": "ready", "1": "dead", "2": "ready"}}
        assert {crew.client.post("/v1").json()["worker"] for _ in range(4)} == {0, 2}
        crew.workers[0].ready = crew.workers[2].ready = False
        assert crew.client.get("/ready").status_code == 503
        answer = crew.client.post("/v1")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_worker"
        assert answer.headers["retry-after"] == "2" and crew.client.get("/health").status_code == 200
    finally:
        for worker in crew.workers:
            worker.ready, worker.state = True, "ready"
    crew.front.draining = lambda: True
    try:
        assert crew.client.get("/ready").status_code == 503
    finally:
        crew.front.draining = lambda: False


def test_what_llava_s_workers_say_is_told_to_all(crew: Team) -> None:
    answer = crew.client.post("/receive_heart_beat", json={"worker_name": "w", "queue_length": 0})
    assert answer.json() == {"exist": False}  # one of the three does not know it, so it comes again
    assert [len(stub.asked) for stub in crew.stubs] == [1, 1, 1]


def test_a_worker_that_dies_in_the_middle_ends_its_answers_as_each_kind_can() -> None:
    with team(1) as made:
        with (
            made.client.stream("POST", "/die_stream", content=b"{}") as events,
            httpx.Client(base_url=made.url, timeout=20) as other,
            other.stream("POST", "/worker_generate_stream", content=b"{}") as llava,
            httpx.Client(base_url=made.url, timeout=20) as third,
            third.stream("POST", "/die_json", content=b"{}") as cut,
        ):
            waiting = made.background("/die_before")
            assert until(lambda: len(made.stubs[0].asked) == 4)
            made.on[0].cut()
            *_, last = b"".join(events.iter_raw()).strip().split(b"\n\n")
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_died"
            *_, last, nothing = b"".join(llava.iter_raw()).split(b"\0")
            assert json.loads(last)["error_code"] == 3 and nothing == b""
            with pytest.raises(httpx.RemoteProtocolError):
                cut.read()
            waiting.join(10)
            assert made.answers[0].status_code == 502
            assert made.answers[0].json()["error"] == {
                "message": "the worker that was answering has died; ask again",
                "type": "server_error",
                "param": None,
                "code": "worker_died",
            }
        made.workers[0].place.unlink()  # nobody listens: nothing reaches it, another would be asked
        answer = made.client.post("/v1")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_worker"
