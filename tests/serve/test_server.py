"""A whole server: where it listens, what it needs a key for, how it starts and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.guarded import Small, until
from vistune.serve import server
from vistune.serve.door import listening, probes
from vistune.serve.door.options import Options, address, guarded, reached
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics
from vistune.serve.work import State

KEY = "a-key-of-this-server"


class Still:
    """An engine that says what it is told to say."""

    def __init__(self, name: str, state: State):
        self.name, self.now = name, state

    def state(self) -> State:
        return self.now


class Nothing:
    """A shelf without models."""

    def __init__(self, *engines: Any):
        self.engines, self.stopped = list(engines), 0

    def served(self) -> list[Any]:
        return []

    def look(self) -> None: ...

    def start(self) -> None: ...

    def stop(self, drain: float = 0.0) -> None:
        self.stopped += 1


async def asking(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.request(method, path, **more)


def ask(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    return asyncio.run(asking(app, method, path, **more))


def application(*engines: Any, **options: Any) -> Any:
    shelf: Any = Nothing(*engines)
    return server.application(shelf, Limits(), Options(log=False, **options))


def routes(app: Any) -> Iterator[tuple[str, str]]:
    """Every method and path that an application answers, those of included routers too."""
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes(inner)
        for method in getattr(route, "methods", None) or ():
            yield method, re.sub(r"\{[^}]*\}", "x", route.path)


def test_every_route_but_health_needs_the_key(tmp_path: Path) -> None:
    app = application(keys=(KEY,), votes=str(tmp_path / "votes.jsonl"), llava=True)
    found = sorted(set(routes(app.app)))
    assert {path for _, path in found} >= {"/", "/votes", "/v1/chat/completions", "/v1/models", "/ready", "/metrics"}
    assert ("POST", "/worker_generate_stream") in found and ("GET", "/page/x") in found

    async def each() -> None:
        for method, path in found:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": KEY, "x-api-key": KEY}):
                answer = await asking(app, method, path, headers=headers)
                assert answer.status_code == (200 if path == "/health" else 401), (method, path)
            answer = await asking(app, method, path, headers={"authorization": f"Bearer {KEY}"})
            assert answer.status_code != 401, (method, path)

    asyncio.run(each())


def test_there_are_no_routes_beside_them() -> None:
    app = application()
    for path in ("/docs", "/redoc", "/openapi.json", "/static/x", "/reset", "/load_model", "/v1", "/votes/x"):
        answer = ask(app, "GET", path)
        assert answer.status_code in (404, 405) and answer.json()["error"]["type"], path


WELL, DEAD = State(running=2, kv_used=5, kv_tokens=10), State(alive=False)
STANDS = State(running=1, idle=100.0)
HUNG = State(running=1, idle=1000.0)
RESTS = State(idle=1000.0)


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [(WELL, 200, 200), (RESTS, 200, 200), (DEAD, 503, 503), (STANDS, 200, 503), (HUNG, 503, 503)],
)
def test_health_and_readiness_are_the_engines(state: State, health: int, ready: int) -> None:
    app = application(Still("one", WELL), Still("two", state))
    assert ask(app, "GET", "/health").status_code == health
    assert ask(app, "GET", "/ready").status_code == ready
    assert ask(app, "HEAD", "/health").status_code == health


def test_draining_is_not_ready_and_alive() -> None:
    app = application(Still("one", WELL))
    app.draining = True
    assert ask(app, "GET", "/health").status_code == 200
    assert ask(app, "GET", "/ready").json() == {"status": "draining"}
    refused = ask(app, "POST", "/v1/chat/completions", json={})
    assert refused.status_code == 503 and refused.headers["retry-after"] == "30"


def test_metrics_of_a_server() -> None:
    app = application(Still("one", WELL))
    ask(app, "POST", "/v1/chat/completions", json={}, headers={"origin": "https://evil.example"})
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(ask(app, "GET", "/metrics").text)
        for sample in family.samples
    }
    assert found["vistune_requests_running", "one"] == 2 and found["vistune_kv_cache_usage_ratio", "one"] == 0.5
    assert found["vistune_refused_total", "403", "foreign_origin"] == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_beyond_this_machine_only_with_a_key(host: str) -> None:
    with pytest.raises(ValueError, match=r"--api-key new.*ssh -L"):
        Options(host=host)
    Options(host=host, keys=(KEY,))


@pytest.mark.parametrize("root", ["x", "/x/", "/"])
def test_prefixes_that_are_none(root: str) -> None:
    with pytest.raises(ValueError, match="--root-path"):
        Options(root_path=root)


def test_a_port_that_is_taken() -> None:
    with listening.on_port("127.0.0.1", 0) as place, pytest.raises(ValueError, match=r"--port \d+: .*choose another"):
        listening.on_port("127.0.0.1", place.getsockname()[1])
    with pytest.raises(ValueError, match="--port 70000"):
        listening.on_port("127.0.0.1", 70000)
    with pytest.raises(ValueError, match=r"--host no\.such\.host"):
        listening.on_port("no.such.host", 0)


def test_a_unix_socket(tmp_path: Path) -> None:
    file = tmp_path / "s"
    with listening.on_file(str(file)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600  # this user alone
        with pytest.raises(ValueError, match="another server"):
            listening.on_file(str(file))
    listening.on_file(str(file)).close()  # one that a dead server left is replaced
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="--uds"):
        listening.on_file(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"
    for path in (tmp_path / "none" / "s", tmp_path / ("x" * 120)):
        with pytest.raises(ValueError, match="--uds"):
            listening.on_file(str(path))


def test_what_is_said_at_the_start() -> None:
    with listening.on_port("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        said = "\n".join(reached(Options(root_path="/lab"), place))
        assert f"http://127.0.0.1:{port}/lab/" in said and f"ssh -N -L {port}:127.0.0.1:{port} " in said
        assert "none is needed" in said
        assert KEY in "\n".join(reached(Options(keys=(KEY,), new_key=KEY), place))
        assert KEY not in "\n".join(reached(Options(keys=(KEY,)), place))  # one that was given is not shown
        assert address(Options(), place) == f"http://127.0.0.1:{port}"


@contextmanager
def listening_to(limits: Limits, stop: Any = lambda: None, **options: Any) -> Iterator[tuple[Any, Small, str]]:
    """A server around a small application, in a thread; its address."""
    small, place = Small(), listening.on_port("127.0.0.1", 0)
    guard = guarded(small, limits, Options(log=False, **options), Metrics())
    running = listening.Listening(guard, lambda: stop(small))
    thread = threading.Thread(target=listening.listen, args=(running, place), daemon=True)
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    thread.start()
    try:
        assert until(lambda: running.started)
        running.thread = thread
        yield running, small, url
    finally:
        small.gate.set()
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def in_thread(url: str, found: list[Any]) -> threading.Thread:
    def asked() -> None:
        try:
            found.append(httpx.get(url, timeout=20, trust_env=False).text)
        except httpx.HTTPError as error:
            found.append(error)

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    return thread


def test_who_runs_may_end_and_nobody_begins() -> None:
    stopped: list[bool] = []
    with listening_to(Limits(drain=20.0), lambda small: stopped.append(small.gate.is_set())) as (running, small, url):
        found: list[Any] = []
        threads = [in_thread(f"{url}/wait", found) for _ in range(3)]
        assert until(lambda: running.guard.open == 3)
        running.handle_exit(signal.SIGTERM, None)
        assert until(lambda: httpx.get(f"{url}/x", trust_env=False).status_code == 503)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        assert not found and not stopped
        small.gate.set()
        for thread in threads:
            thread.join(10)
        assert found == ["/wait"] * 3
        running.thread.join(10)
        assert stopped == [True]  # only when everybody had ended
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/x", trust_env=False)


def test_after_the_time_to_drain_answers_are_ended() -> None:
    with listening_to(Limits(drain=0.2), lambda small: small.gate.set()) as (running, _, url):
        found: list[Any] = []
        thread = in_thread(f"{url}/wait", found)
        assert until(lambda: running.guard.open == 1)
        running.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        running.thread.join(10)
        assert found == ["/wait"] and not running.stuck


def test_what_does_not_end_does_not_hold_the_server(monkeypatch, capfd) -> None:
    monkeypatch.setattr(listening, "LAST", 0.2)
    gate = threading.Event()
    with listening_to(Limits(drain=0.1), lambda small: gate.wait(20)) as (running, _, url):
        found: list[Any] = []
        thread = in_thread(f"{url}/wait", found)
        assert until(lambda: running.guard.open == 1)
        running.handle_exit(signal.SIGTERM, None)
        running.thread.join(10)
        assert not running.thread.is_alive() and running.stuck
        thread.join(10)
        assert '"stopping"' in found[0]
        gate.set()


@pytest.mark.parametrize("error", [ValueError, MemoryError, SystemExit])
def test_models_that_do_not_open_end_the_server(error: type[BaseException]) -> None:
    def fails() -> Any:
        raise error("no such folder")

    with pytest.raises(error, match="no such folder"):
        server.run(fails, Limits(), Options(port=0))


def test_while_models_open_the_server_lives_and_is_not_ready() -> None:
    guard = guarded(probes.opening, Limits(), Options(log=False))
    assert ask(guard, "GET", "/health").json() == {"status": "opening"}
    for path in ("/ready", "/v1/models", "/"):
        found = ask(guard, "GET", path)
        assert found.status_code == 503 and found.json()["error"]["code"] == "opening"
        assert found.headers["retry-after"] == "5"


def test_a_server_from_its_start_to_its_end(monkeypatch, capsys) -> None:
    """In this process's main thread, as the verb runs it: signals are heard, sockets are closed, handlers restored."""
    before, shelf, url = signal.getsignal(signal.SIGTERM), Nothing(), []

    def asked() -> None:
        assert until(lambda: re.search(r"page  (http\S+)", "".join(said)))
        url.append(re.search(r"page  (http\S+)", "".join(said))[1])  # type: ignore[index]
        found.append(httpx.get(f"{url[0]}ready", trust_env=False).status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    found: list[int] = []
    monkeypatch.setattr(server.console, "say", said.append)
    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    server.run(lambda: shelf, Limits(drain=5.0), Options(port=0, log=False))  # type: ignore[arg-type,return-value]
    thread.join(10)
    assert found == [200] and shelf.stopped == 1
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(url[0], trust_env=False)
