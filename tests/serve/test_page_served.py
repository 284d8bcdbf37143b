"""The page before a whole server with a tiny model: what it streams, that a row is freed by stop, its real errors."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import PIL.Image
import pytest

from tests.made import stage0
from tests.serve.browser import Watched, answered, asked, comes, dropped, under
from tests.serve.served import Serving, listening, serving, until

pytestmark = pytest.mark.slow
KEY = "a-key-of-more-than-sixteen-letters"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage0(tmp_path_factory.mktemp("model"))


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.effect_noise((width, height), 80).convert("RGB").save(out, "PNG")
    return out.getvalue()


def running(served: Serving) -> int:
    return served.engine.state().running


def test_a_picture_is_asked_about_and_the_answer_is_the_models(watched: Watched, model: Path, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    with serving(model, options={"votes": str(votes)}) as served:
        page = watched.open(served.url + "/")
        assert page.input_value("#model") == served.name
        page.fill("#temperature", "0")
        page.fill("#max_tokens-number", "24")
        page.press("#max_tokens-number", "Tab")
        dropped(page, ("one.png", "image/png", png(64, 48)))
        dropped(page, ("two.png", "image/png", png(48, 64)), event="paste")
        comes(page, "document.querySelectorAll('#thumbs img').length === 2")
        asked(page, "What is there?")
        first = answered(page)
        assert first and not page.is_visible(".fault")
        asked(page, "And there?")
        answered(page)
        page.click(".again:visible")
        comes(page, "!document.querySelector('.turn:last-child[aria-busy=true]')")
        answered(page)
        page.click(".turn:first-child [data-vote=flag]")
        page.wait_for_selector("[data-vote=flag][aria-pressed=true]")
        line = json.loads(votes.read_text())
        assert line["type"] == "flag" and line["model"] == served.name and line["ip"] == "127.0.0.1"
        assert line["state"]["messages"][0] == ["USER", "<image>\n<image>\nWhat is there?"]
        assert line["state"]["messages"][1][1].split() == first.split()
        assert served.idle()


def test_an_answer_is_stopped_and_its_row_is_free(watched: Watched, model: Path) -> None:
    with serving(model) as served:
        page = watched.open(served.url + "/")
        page.fill("#max_tokens-number", "100000")
        page.press("#max_tokens-number", "Tab")
        stopped = False
        for _ in range(8):  # a tiny model may be done before a hand is at the button
            asked(page, "Tell me everything.")
            if until(lambda: running(served) == 1, 2):
                page.evaluate("document.getElementById('stop').click()")
            page.wait_for_selector(".turn:last-child[aria-busy=false]")
            stopped = "stopped" in page.inner_text(".turn:last-child .count")
            if stopped:
                break
            page.click("#new")
        assert stopped
        began = time.monotonic()
        assert served.idle(10) and time.monotonic() - began < 10


def test_the_servers_own_refusals_are_shown(watched: Watched, model: Path) -> None:
    with serving(model, context=64, picture_bytes=4000) as served:
        page = watched.open(served.url + "/", expected=["status of"])
        asked(page, "word " * 200)
        page.wait_for_selector(".fault:not([hidden])")
        assert "400" in page.inner_text(".fault .what") and "64" in page.inner_text(".fault .why")
        page.click("#new")
        dropped(page, ("large.png", "image/png", png(200, 200)))
        page.wait_for_selector("#notice:has-text('made smaller')")


def test_behind_a_proxy_with_a_prefix_and_a_key(watched: Watched, model: Path) -> None:
    options = {"root_path": "/lab/x", "keys": (KEY,), "behind_proxy": True}
    known = {"username": "anybody", "password": KEY}
    with serving(model, options=options) as served, listening(under("/lab/x", served.app)) as url:
        for address in (f"{url}/lab/x/", f"{url}/lab/x", f"{served.url}/", f"{served.url}/lab/x"):
            page = watched.open(address, http_credentials=known)
            page.fill("#max_tokens-number", "8")
            page.press("#max_tokens-number", "Tab")
            asked(page, "What?")
            answered(page)
            assert not page.is_visible(".fault"), address


def test_without_the_key_there_is_no_page(watched: Watched, model: Path) -> None:
    with serving(model, options={"keys": (KEY,)}) as served:
        wrong = {"username": "anybody", "password": KEY[:-1]}
        page = watched.open(served.url + "/", wait=False, expected=["401"], http_credentials=wrong)
        assert page.query_selector("#ask") is None and "a key is needed" in page.inner_text("body")
