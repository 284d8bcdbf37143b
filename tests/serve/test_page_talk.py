"""The page in a browser, before a stub: what a person does, what then is asked, and what is shown, errors above all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.serve.browser import Stub, Watched, answered, asked, comes, dropped, under
from tests.serve.served import listening, until
from vistune.serve.refused import Refused


def png(width: int = 40, height: int = 30, color: tuple[int, int, int] = (20, 120, 220)) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (width, height), color).save(out, "PNG")
    return out.getvalue()


ONE, TWO = ("one.png", "image/png", png()), ("two.png", "image/png", png(30, 50, (200, 80, 20)))


def url_of(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def pictures(page: Any, count: int) -> None:
    comes(page, f"document.querySelectorAll('#thumbs img').length === {count}")


def seen(page: Any, text: str, within: str = "body") -> None:
    page.wait_for_selector(f"{within}:has-text({json.dumps(text, ensure_ascii=False)})")


def test_a_picture_is_dropped_a_question_asked_an_answer_grows_and_is_voted_on(
    watched: Watched, tmp_path: Path
) -> None:
    stub = Stub(tmp_path / "votes")
    stub.hold = 1
    with listening(stub.app) as url:
        page = watched.open(url)
        dropped(page, ONE)
        dropped(page, TWO, event="paste")
        pictures(page, 2)
        asked(page, "How many?")
        seen(page, "Four", ".turn .said > .words")
        assert page.is_visible("#stop") and not page.is_visible("#send")
        assert page.inner_text(".said > .words").strip() == "Four"
        stub.hold = -1
        assert answered(page) == "Four sevens."
        body = stub.bodies[0]
        assert body["messages"] == [
            {"role": "user", "content": [url_of(ONE[2]), url_of(TWO[2]), {"type": "text", "text": "How many?"}]}
        ]
        assert {k: body[k] for k in body if k != "messages"} == {
            "model": "tiny",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.2,
            "top_p": 0.7,
            "max_tokens": 512,
        }
        assert page.evaluate("document.activeElement.id") == "text"
        assert page.inner_text("#said") == "Answer: Four sevens."
        assert "2 tokens" in page.inner_text(".count") and "12 in the prompt" in page.inner_text(".count")
        page.click("[data-vote=downvote]")
        page.wait_for_selector("[data-vote=downvote][aria-pressed=true]")
        seen(page, "vote written", ".count")
        line = json.loads((tmp_path / "votes").read_text())
        assert (line["type"], line["state"]["messages"][1]) == ("downvote", ["ASSISTANT", "Four sevens."])
        assert line["images"] == [hashlib.sha256(data).hexdigest() for _, _, data in (ONE, TWO)]
        assert b"base64" not in (tmp_path / "votes").read_bytes()
        assert all(page.is_disabled(f"[data-vote={name}]") for name in ("upvote", "downvote", "flag"))


@pytest.mark.slow
def test_turns_go_on_with_their_pictures_and_the_last_is_asked_again_or_changed(watched: Watched) -> None:
    stub = Stub()
    with listening(stub.app) as url:
        page = watched.open(url)
        assert not page.is_visible("#votes-note")
        dropped(page, ONE)
        asked(page, "First?")
        answered(page)
        assert page.query_selector(".votes") and not page.is_visible(".votes")
        stub.says = ["Second."]
        asked(page, "Second?")
        assert answered(page) == "Second."
        assert page.locator(".turn .pictures img").count() == 1 and page.is_visible(".turn .pictures img")
        first = {"role": "user", "content": [url_of(ONE[2]), {"type": "text", "text": "First?"}]}
        said = {"role": "assistant", "content": "Four sevens."}
        assert stub.bodies[1]["messages"] == [first, said, {"role": "user", "content": "Second?"}]
        stub.says = ["Again."]
        assert page.locator(".again:visible").count() == 1
        page.click(".again:visible")
        comes(page, "document.querySelector('.turn:last-child .said > .words').innerText === 'Again.'")
        answered(page)
        assert stub.bodies[2]["messages"] == stub.bodies[1]["messages"]
        page.fill("#text", "half a thought")
        page.click(".edit:visible")
        assert page.input_value("#text") == "Second?" and page.is_visible("#editing")
        page.click("#cancel-edit")
        assert page.input_value("#text") == "half a thought"
        page.click(".edit:visible")
        asked(page, "Changed?")
        answered(page)
        assert stub.bodies[3]["messages"] == [first, said, {"role": "user", "content": "Changed?"}]
        assert page.locator(".turn").count() == 2 and page.input_value("#text") == "half a thought"
        page.click("#new")
        assert page.locator(".turn").count() == 0 and page.input_value("#text") == ""
        asked(page, "Fresh?")
        answered(page)
        assert stub.bodies[4]["messages"] == [{"role": "user", "content": "Fresh?"}]


@pytest.mark.slow
def test_an_answer_is_stopped_and_the_server_hears_of_it(watched: Watched) -> None:
    stub = Stub()
    stub.hold = 1
    with listening(stub.app) as url:
        page = watched.open(url)
        asked(page, "Go")
        seen(page, "Four", ".said > .words")
        page.click("#stop")
        assert answered(page).strip() == "Four"
        assert until(lambda: stub.left == 1)
        assert "stopped" in page.inner_text(".count") and not page.is_visible(".fault")
        asked(page, "Go on")
        page.wait_for_selector("#stop:not([hidden])")
        page.keyboard.press("Escape")
        page.wait_for_selector(".turn:last-child[aria-busy=false]")
        assert stub.bodies[1]["messages"][1] == {"role": "assistant", "content": "Four "}
        stub.hold = -1
        asked(page, "Now")
        answered(page)
        assert stub.bodies[2]["messages"][-1] == {"role": "user", "content": "Now"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refused", "shown"),
    [
        (
            Refused(400, "the picture is too large", param="messages[0].content[0].image_url", code="too_large"),
            ["refused: 400", "the picture is too large", "at messages[0].content[0].image_url", "code too_large"],
        ),
        (Refused(429, "the server is busy", code="queue_full", retry_after=3), ["429", "busy", "come again in 3 s"]),
        (Refused(500, "CUDA out of memory", code="engine"), ["failed: 500", "CUDA out of memory"]),
        (Refused(404, "there is no model x", code="model_not_found"), ["404", "there is no model x"]),
    ],
)
def test_the_servers_own_error_is_shown_and_the_question_kept(
    watched: Watched, refused: Refused, shown: list[str]
) -> None:
    stub = Stub()
    stub.refuses = refused
    with listening(stub.app) as url:
        page = watched.open(url, expected=["status of"])
        dropped(page, ONE)
        pictures(page, 1)
        asked(page, "What?")
        page.wait_for_selector(".fault[role=alert]:not([hidden])")
        for text in shown:
            seen(page, text, ".fault")
        assert page.inner_text(".asked .words") == "What?" and page.is_visible(".asked img")
        stub.refuses = None
        page.click(".retry")
        assert answered(page) == "Four sevens." and not page.is_visible(".fault")
        assert stub.bodies[1]["messages"] == stub.bodies[0]["messages"]


@pytest.mark.slow
def test_an_error_in_the_middle_keeps_what_came(watched: Watched) -> None:
    stub = Stub()
    stub.says = ["Half ", {"error": {"message": "the server is stopping", "type": "server_error", "code": "stopping"}}]
    stub.ends = False
    with listening(stub.app) as url:
        page = watched.open(url)
        asked(page, "What?")
        page.wait_for_selector(".fault:not([hidden])")
        for text in ("broke the answer off", "the server is stopping", "code stopping", "What came so far is kept"):
            seen(page, text, ".fault")
        assert answered(page).strip() == "Half"
        stub.says = ["Half "]
        page.click(".retry")
        seen(page, "The connection ended before the answer did", ".fault")
        stub.says = [b"data: {not json}\n\n"]
        page.click(".retry")
        seen(page, "JSON", ".fault .why")


@pytest.mark.slow
def test_a_proxys_page_is_not_taken_for_an_answer(watched: Watched) -> None:
    stub = Stub()
    proxied = under("", stub.app)

    async def broken(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if not scope["path"].endswith("completions"):
            return await proxied(scope, receive, send)
        await send({"type": "http.response.start", "status": 502, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<html><h1>Bad Gateway</h1></html>"})

    with listening(broken) as url:
        page = watched.open(url, expected=["502"])
        asked(page, "What?")
        seen(page, "failed: 502", ".fault")
        assert page.inner_text(".fault .why") == "Bad Gateway" and "<" not in page.inner_text(".fault")


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back(watched: Watched) -> None:
    stub = Stub()
    stub.hold = 1
    away = ["ERR_"]
    with listening(stub.app) as url:
        page = watched.open(url, expected=away)
        asked(page, "What?")
        seen(page, "Four", ".said > .words")
        port = int(url.rpartition(":")[2])
        page.fill("#text", "the next thought")
        threading.Timer(0.2, lambda: setattr(stub, "ends", False)).start()
        stub.ends, stub.hold = False, -1
        answered(page)
    seen(page, "The connection ended", ".fault")
    page.click(".retry")
    seen(page, "The server was not reached", ".fault")
    page.wait_for_selector("#away:not([hidden])")
    assert page.input_value("#text") == "the next thought"
    again = Stub()
    again.models = ["newer"]
    with listening(again.app, port=port):
        page.wait_for_selector("#away", state="hidden")
        seen(page, "tiny is no longer served; newer is chosen", "#notice")
        page.click(".retry")
        assert answered(page) == "Four sevens." and again.bodies[0]["model"] == "newer"


def keyed(app: Callable[..., Any], key: str) -> Callable[..., Any]:
    """A guard: pages are asked for by Basic, everything else by Bearer."""
    basic = b"Basic " + base64.b64encode(b"x:" + key.encode())

    async def guarded(scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if scope["path"] == "/health" or headers.get(b"authorization") in (basic, b"Bearer " + key.encode()):
            return await app(scope, receive, send)
        html = b"text/html" in headers.get(b"accept", b"")
        body = json.dumps(Refused(401, "a key is needed", code="invalid_api_key").body()).encode()
        challenge = (b"www-authenticate", b'Basic realm="x"' if html else b"Bearer")
        kind = (b"content-type", b"application/json")
        await send({"type": "http.response.start", "status": 401, "headers": [challenge, kind]})
        await send({"type": "http.response.body", "body": body})

    return guarded


@pytest.mark.slow
def test_a_key_is_the_browsers_password_the_addresss_fragment_or_given_on_the_page(watched: Watched) -> None:
    stub = Stub()
    lock = {"key": "first"}

    async def guarded(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await keyed(stub.app, lock["key"])(scope, receive, send)

    with listening(guarded) as url:
        page = watched.open(url.replace("//", "//x:first@"), expected=["401"])
        asked(page, "One")
        answered(page)
        assert stub.headers[-1]["authorization"].startswith("Basic ")
        lock["key"] = "second"  # the server was started again
        asked(page, "Two")
        seen(page, "refused: 401", ".fault")
        seen(page, "The server wants a key", ".fault")
        page.fill("#key", "second")
        page.press("#key", "Enter")
        page.click(".retry:visible")
        assert answered(page) == "Four sevens."
        assert stub.headers[-1]["authorization"] == "Bearer second"
        lock["key"] = "first"
        page = watched.open(
            url + "/#key=third", http_credentials={"username": "x", "password": "first"}, expected=["401"]
        )
        assert "third" not in page.url and page.evaluate("sessionStorage.getItem('vistune.key')") == "third"


@pytest.mark.slow
def test_models_are_those_that_are_there_now(watched: Watched) -> None:
    stub = Stub()
    with listening(stub.app) as url:
        page = watched.open(url + "/?model=other")
        names = "[...document.querySelectorAll('#model option')].map((one) => one.value)"
        assert page.evaluate(names) == ["tiny", "other"] and page.input_value("#model") == "other"
        stub.models = ["tiny", "other", "an-adapter"]
        page.focus("#model")
        comes(page, f"{names}.length === 3")
        assert page.input_value("#model") == "other"
        page.select_option("#model", "an-adapter")
        asked(page, "What?")
        answered(page)
        assert stub.bodies[0]["model"] == "an-adapter" and "an-adapter" in page.inner_text(".count")
        stub.models = ["tiny"]
        page.evaluate("window.dispatchEvent(new Event('focus'))")
        seen(page, "an-adapter is no longer served; tiny is chosen", "#notice")


@pytest.mark.slow
def test_parameters_are_sent_as_they_are_set(watched: Watched) -> None:
    stub = Stub(new_tokens=800)
    with listening(stub.app) as url:
        page = watched.open(url)
        page.fill("#system", "Be brief.")
        page.fill("#temperature", "0.9")
        page.fill("#top_p-number", "0.35")
        page.press("#top_p-number", "Tab")
        page.fill("#max_tokens-number", "99999")
        page.press("#max_tokens-number", "Tab")
        page.fill("#seed", "7")
        assert page.input_value("#max_tokens-number") == "800" and page.input_value("#temperature-number") == "0.9"
        asked(page, "What?")
        answered(page)
        body = stub.bodies[0]
        assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.9, 0.35, 800, 7)
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        assert page.input_value("#seed") == "7" and page.input_value("#system") == "Be brief."
        page.fill("#seed", "7.5")
        assert page.get_attribute("#seed", "aria-invalid") == "true"
        page.click("#reset")
        page.fill("#max_tokens", "0")
        asked(page, "Again?")
        answered(page)
        assert not {"seed", "max_tokens"} & stub.bodies[1].keys() and stub.bodies[1]["temperature"] == 0.2


@pytest.mark.slow
def test_a_reload_loses_nothing(watched: Watched) -> None:
    stub = Stub()
    with listening(stub.app) as url:
        page = watched.open(url)
        dropped(page, ONE)
        asked(page, "First?")
        answered(page)
        dropped(page, TWO)
        page.fill("#text", "not yet asked")
        pictures(page, 1)
        comes(page, "(sessionStorage.getItem('vistune.talk') || '').includes('not yet asked')")
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        assert answered(page) == "Four sevens." and page.input_value("#text") == "not yet asked"
        page.click("#send")
        comes(page, "document.querySelectorAll('.turn').length === 2")
        answered(page)
        assert stub.bodies[1]["messages"][0] == stub.bodies[0]["messages"][0]
        assert stub.bodies[1]["messages"][2]["content"][0] == url_of(TWO[2])


@pytest.mark.slow
def test_pictures_that_do_not_fit_into_the_tabs_store_are_told(watched: Watched) -> None:
    stub = Stub()
    with listening(stub.app) as url:
        page = watched.open(url)
        page.evaluate(
            """() => { // all but some 20,000 characters of the store are taken
              for (let name = 0, size = 1 << 23; size > 20000; size >>= 1) {
                try { for (;;) sessionStorage.setItem(`filler${name++}`, "x".repeat(size)); } catch { continue; }
              }
            }"""
        )
        large = PIL.Image.effect_noise((300, 300), 90)
        large.save(data := io.BytesIO(), "PNG")
        page.set_input_files("#files", [{"name": "large.png", "mimeType": "image/png", "buffer": data.getvalue()}])
        pictures(page, 1)
        asked(page, "What?")
        answered(page)
        seen(page, "too large to be kept over a reload", "#notice")
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        assert answered(page) == "Four sevens."
        assert "left out" in page.get_attribute(".turn .look", "aria-label")
        asked(page, "And now?")
        answered(page)
        assert stub.bodies[1]["messages"][0]["content"] == [{"type": "text", "text": "What?"}] or (
            stub.bodies[1]["messages"][0]["content"] == "What?"
        )


@pytest.mark.slow
def test_caps_are_told_before_anything_is_sent(watched: Watched) -> None:
    stub = Stub(pictures=2, picture_pixels=1000)
    with listening(stub.app) as url:
        page = watched.open(url)
        dropped(page, ONE, TWO, ONE)
        pictures(page, 2)
        seen(page, "The server takes 2 pictures in a conversation", "#notice")
        seen(page, "one.png was made smaller, 40 × 30", "#notice")
        page.click("#thumbs .remove >> nth=0")
        pictures(page, 1)
        page.click("#send")
        seen(page, "Write a question first", "#notice")
        assert not stub.bodies


@pytest.mark.slow
def test_the_page_speaks_chinese(watched: Watched) -> None:
    stub = Stub()
    stub.says = ["你好，", "世界"]
    with listening(stub.app) as url:
        page = watched.open(url, locale="zh-CN")
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        seen(page, "对着图片提问", ".empty")
        assert page.get_attribute("#send", "aria-label") == "发送"
        asked(page, "你好")
        assert answered(page) == "你好，世界"
        stub.refuses = Refused(400, "the picture is too large")
        page.click(".edit:visible")
        page.click("#language")
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.input_value("#text") == "你好" and "2 tokens" in page.inner_text(".count")
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        assert page.inner_text("#new") == "New"


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_everything_without_scrolling_sideways(watched: Watched, width: int) -> None:
    stub = Stub()
    stub.says = [
        "| a | b |\n|---|---|\n" + "| " + "wide" * 60 + " | x |\n\n```\n" + "long " * 60 + "\n```\n" + "w" * 300
    ]
    with listening(stub.app) as url:
        size = {"width": width, "height": 844 if width == 390 else 568}
        page = watched.open(url, viewport=size, is_mobile=True, has_touch=True)
        dropped(page, ONE)
        page.fill("#text", "one line")
        page.press("#text", "Enter")
        page.type("#text", "another")
        assert page.input_value("#text") == "one line\nanother"  # a phone's Enter is a new line
        assert page.is_visible("#camera") and page.get_attribute("#shot", "capture") == "environment"
        asked(page, "What?")
        answered(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(
            "document.querySelector('#talk').scrollWidth <= document.querySelector('#talk').clientWidth"
        )
        assert not page.is_visible("#settings")
        page.click("#open-settings")
        assert page.is_visible("#temperature") and page.get_attribute("#open-settings", "aria-expanded") == "true"
        page.keyboard.press("Escape")
        assert not page.is_visible("#settings")
        wrong = """[...document.querySelectorAll("button, select")].filter((one) => {
          const {right, height} = one.getBoundingClientRect();
          return one.offsetParent && (right > innerWidth || height < 24);
        }).map((one) => one.outerHTML)"""
        assert page.evaluate(wrong) == []


@pytest.mark.slow
@pytest.mark.parametrize("slash", ["/", ""])
def test_behind_a_prefix_that_the_server_was_told_of(watched: Watched, slash: str) -> None:
    stub = Stub()

    async def rooted(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await stub.app({**scope, "root_path": "/lab/x", "path": "/lab/x" + scope["path"]}, receive, send)

    with listening(under("/lab/x", rooted)) as url:
        page = watched.open(f"{url}/lab/x{slash}")
        asked(page, "What?")
        assert answered(page) == "Four sevens."


@pytest.mark.slow
def test_behind_a_prefix_that_the_server_knows_nothing_of(watched: Watched) -> None:
    stub = Stub()
    with listening(under("/proxy/8000", stub.app)) as url:
        page = watched.open(f"{url}/proxy/8000/")
        asked(page, "What?")
        assert answered(page) == "Four sevens."


@pytest.mark.slow
def test_the_policy_is_in_force(watched: Watched) -> None:
    with listening(Stub().app) as url:
        page = watched.open(url, expected=["Content Security Policy", "Content-Security-Policy"])
        found = page.evaluate(
            """async () => {
              const broken = [];
              document.addEventListener("securitypolicyviolation", (one) => broken.push(one.effectiveDirective));
              const script = document.createElement("script");
              script.textContent = "window.hit = 1";
              document.body.append(script);
              const style = document.createElement("style");
              style.textContent = "body { color: red }";
              document.head.append(style);
              const image = new Image();
              image.src = "http://127.0.0.1:9/x.png";
              await fetch("http://127.0.0.1:9/").catch(() => null);
              await new Promise((done) => setTimeout(done, 50));
              return {broken: broken.sort(), hit: window.hit ?? null};
            }"""
        )
        assert found == {"broken": ["connect-src", "img-src", "script-src-elem", "style-src-elem"], "hit": None}
        watched.foreign = [one for one in watched.foreign if not one.startswith("http://127.0.0.1:9/")]


@pytest.mark.slow
def test_an_answer_may_have_half_of_a_models_context(watched: Watched) -> None:
    stub = Stub()
    stub.contexts = {"tiny": 300}
    with listening(stub.app) as url:
        page = watched.open(url)
        assert page.input_value("#max_tokens-number") == "150"
        page.select_option("#model", "other")
        assert page.input_value("#max_tokens-number") == "512"
        page.select_option("#model", "tiny")
        asked(page, "What?")
        answered(page)
        assert stub.bodies[0]["max_tokens"] == 150


@pytest.mark.slow
def test_a_server_that_reads_its_models_is_waited_for(watched: Watched) -> None:
    stub = Stub()
    stub.opening = 2
    with listening(stub.app) as url:
        page = watched.open(url, expected=["503"])
        seen(page, "failed: 503: the models are being read", "#notice")
        comes(page, "document.getElementById('model').value === 'tiny'")
        assert not page.is_visible("#notice")
