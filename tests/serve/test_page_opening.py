"""The page while the models are read: who gets it, with what, from one server and from several, and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.made import stage0
from tests.serve.browser import Watched, under
from tests.serve.guarded import until
from tests.serve.served import listening
from vistune.serve import server
from vistune.serve.door import probes
from vistune.serve.door.guard import Guard
from vistune.serve.door.options import Options, guarded
from vistune.serve.limits import Limits
from vistune.serve.page.opening import meanwhile
from vistune.serve.shelf import open_shelf
from vistune.serve.workers import run as several
from vistune.serve.workers.crew import Crew
from vistune.serve.workers.front import Front
from vistune.serve.workers.worker import Worker

KEY = "a-key-of-more-than-sixteen-letters"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
ONE, FRONT = "the models are being read", "no worker is ready; ask again"


class Nothing:
    """A shelf without models."""

    engines: Sequence[Any] = ()

    def start(self) -> None: ...
    def stop(self, drain: float = 0.0) -> None: ...
    def served(self) -> list[Any]:
        return []


def workers(tmp_path: Path, *states: str) -> list[Worker]:
    """Workers without processes."""
    made = [Worker(number, tmp_path / f"{number}.sock") for number in range(len(states))]
    for one, state in zip(made, states, strict=True):
        one.state, one.ready = state, state == "ready"
    return made


def fronting(tmp_path: Path, *states: str) -> Any:
    front = Front(workers(tmp_path, *states))
    return meanwhile(front, front.opening)


def ask(app: Any, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(asked())


@pytest.fixture(params=["one", "front"])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """An application whose models are being read, and what it says of that to programs."""
    if request.param == "one":
        return meanwhile(probes.opening), ONE
    return fronting(tmp_path, "starting", "starting"), FRONT


def closed(app: Any, **options: Any) -> Guard:
    return guarded(app, Limits(), Options(log=False, **options))


@pytest.mark.parametrize(("root", "paths"), [("", ("/", "/?model=x")), ("/lab/x", ("/", "/lab/x", "/lab/x/"))])
def test_a_browser_is_told_to_wait(opening: tuple[Any, str], root: str, paths: Sequence[str]) -> None:
    app = closed(opening[0], root_path=root)
    for path in paths:
        for method in ("GET", "HEAD"):
            found = ask(app, path, method, **BROWSER)
            assert found.status_code == 503 and found.headers["retry-after"] == "5"
            assert found.headers["content-type"] == "text/html; charset=utf-8"
            assert found.headers["cache-control"] == "no-store"
            assert "script-src 'self'; style-src 'self'" in found.headers["content-security-policy"]
            assert found.headers["x-content-type-options"] == "nosniff"
        text = ask(app, path, **BROWSER).text
        assert "The models are being read" in text
        for address in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', text):
            assert address.startswith(f"{root}/page/" if root else "page/")
            assert ask(app, f"/{address.lstrip('/')}").status_code == 200, address


def test_the_files_that_the_page_needs_are_there(opening: tuple[Any, str]) -> None:
    app, seen, left = closed(opening[0]), set(), {"opening.js"}
    while left:
        seen |= left
        texts = [ask(app, f"/page/{name}") for name in left]
        assert all(one.status_code == 200 for one in texts), left
        assert {one.headers["content-type"] for one in texts} == {"text/javascript; charset=utf-8"}
        left = {name for one in texts for name in re.findall(r'from "\./(\w+\.js)"', one.text)} - seen
    assert {"server.js", "words.js", "en.js", "zh.js"} <= seen


def test_everybody_else_hears_it_as_before(opening: tuple[Any, str]) -> None:
    app, said = closed(opening[0]), opening[1]
    others = [("/", "GET", {}), ("/", "GET", {"accept": "application/json"}), ("/", "POST", BROWSER)]
    others += [(path, "GET", BROWSER) for path in ("/v1/models", "/page/settings", "/page/no.js", "/page/opening.html")]
    for path, method, headers in others:
        found = ask(app, path, method, **headers)
        assert found.status_code == 503 and found.json()["error"]["message"] == said, path
        assert "retry-after" in found.headers
    assert ask(app, "/health", **BROWSER).status_code == 200
    assert ask(app, "/ready", **BROWSER).status_code == 503


def test_the_page_is_behind_the_key(opening: tuple[Any, str]) -> None:
    found = ask(closed(opening[0], keys=(KEY,)), "/", **BROWSER)
    assert found.status_code == 401 and found.headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    ("states", "shown"),
    [(("starting", "dead"), True), (("dead", "not ready"), False), (("ready", "starting"), False)],
)
def test_a_front_shows_it_while_nobody_is_there_and_somebody_reads(
    tmp_path: Path, states: Sequence[str], shown: bool
) -> None:
    found = ask(closed(fronting(tmp_path, *states)), "/", **BROWSER)
    assert found.status_code == 503
    assert found.headers["content-type"].startswith("text/html" if shown else "application/json")


@pytest.mark.parametrize("page", [True, False])
def test_a_server_shows_it_from_its_start(monkeypatch: pytest.MonkeyPatch, page: bool) -> None:
    said: list[str] = []
    found: list[httpx.Response] = []
    gate = threading.Event()

    def opened() -> Any:
        assert gate.wait(20)
        return Nothing()

    def asked() -> None:
        assert until(lambda: said)
        url = re.search(r"http\S+(?=/health)", said[0])
        assert url
        found.append(httpx.get(url[0], headers=BROWSER, trust_env=False))
        gate.set()
        assert until(lambda: len(said) > 1)
        found.append(httpx.get(url[0], headers=BROWSER, trust_env=False))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(server.console, "say", said.append)
    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    server.run(opened, Limits(), Options(port=0, log=False, page=page))
    thread.join(10)
    assert [one.status_code for one in found] == [503, 200 if page else 404]
    assert found[0].headers["content-type"].startswith("text/html" if page else "application/json")


@pytest.mark.parametrize("page", [True, False])
def test_a_front_shows_it_from_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: bool) -> None:
    made: list[Guard] = []

    def fronting(guard: Guard, *_: Any) -> Any:
        made.append(guard)
        return type("Ended", (), {"error": None})

    monkeypatch.setattr(several, "Fronting", fronting)
    monkeypatch.setattr(several, "listen", lambda server, place: place.close())
    crew = Crew(workers(tmp_path, "starting"), lambda worker: pytest.fail("nothing is started"))
    options = Options(port=0, log=False, page=page)
    several._serve(crew, Limits(), options, several.bound(options))
    found = ask(made[0], "/", **BROWSER)
    assert found.status_code == 503
    assert found.headers["content-type"].startswith("text/html" if page else "application/json")


PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], str, Callable[[Any], Any]]] = {
    # the server's options, the browser's, the page's path, what stands before the server
    "plain": ({}, {}, "/", lambda app: app),
    "behind": (
        {"root_path": "/lab/x", "keys": (KEY,), "behind_proxy": True},
        {
            "http_credentials": {"username": "anybody", "password": KEY},
            "locale": "zh-CN",
            "color_scheme": "dark",
            "viewport": {"width": 320, "height": 560},
        },
        "/lab/x",
        lambda app: under("/lab/x", app),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_it_becomes_the_chat_page_by_itself(watched: Watched, tmp_path: Path, place: str) -> None:
    told, seen, path, before = PLACES[place]
    options = Options(log=False, **told)
    guard = closed(meanwhile(probes.opening), **told)
    shelf = open_shelf([str(stage0(tmp_path))], device="cpu", limits=guard.limits)
    with listening(before(guard)) as url:
        page = watched.open(url + path, wait=False, expected=["503"], **seen)
        said = "正在读取模型" if place == "behind" else "The models are being read"
        page.wait_for_selector(f"h2:has-text('{said}')")
        assert page.evaluate("document.documentElement.dataset.theme") == seen.get("color_scheme", "light")
        assert not page.is_visible("#away") and not page.query_selector("#ask")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        guard.app = server.inside(shelf, guard, options, server.shown(guard.limits, options))
        page.wait_for_selector("html[data-ready=yes]")
        assert page.input_value("#model") == shelf.served()[0].name and page.is_visible("#ask")


@pytest.mark.slow
def test_it_says_when_the_server_is_gone_and_waits_on(watched: Watched) -> None:
    with listening(closed(meanwhile(probes.opening))) as url:
        page = watched.open(url + "/", wait=False, expected=["503", "ERR_"])
        page.wait_for_selector("h2:has-text('being read')")
        assert not page.is_visible("#away")
    page.wait_for_selector("#away:has-text('not reached')")
    with listening(closed(meanwhile(probes.opening)), port=int(url.rpartition(":")[2])):
        page.wait_for_selector("#away", state="hidden")
