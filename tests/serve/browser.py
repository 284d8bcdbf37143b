"""A browser without a window, and a stub of a server that says what a test tells it to, over the real wire."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from vistune.serve.limits import Limits
from vistune.serve.page.routes import router
from vistune.serve.refused import Refused

ARGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
)
QUIET = 10_000
"""Milliseconds that something on the page may take to come about, on a busy machine."""


def chromium() -> str:
    """The browser's path. Skips the test where there is none, unless VISTUNE_BROWSER=1 says that there has to be."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found and os.environ.get("VISTUNE_BROWSER") == "1":
        pytest.fail("VISTUNE_BROWSER=1, but there is no chromium on the PATH")
    if not found:
        pytest.skip("no chromium on the PATH")
    return found


class Watched:
    """Pages of one browser, each in a fresh profile, which must ask no foreign host and log no error."""

    def __init__(self, browser: Any):
        self.browser = browser
        self.contexts: list[Any] = []
        self.foreign: list[str] = []
        self.errors: list[str] = []

    def open(self, url: str, *, wait: bool = True, expected: Sequence[str] = (), **options: Any) -> Any:
        """A page at `url`, ready. `expected`: parts of console errors that belong to the test."""
        home = "/".join(url.split("/")[:3]).rpartition("@")[2].removeprefix("http://")
        context = self.browser.new_context(**{"locale": "en-GB", **options})
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(QUIET)
        page.on("request", lambda asked: self._asked(asked.url, home))
        page.on("console", lambda said: self._said(said, expected))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        if wait:
            page.wait_for_selector("html[data-ready=yes]")
        return page

    def _asked(self, url: str, home: str) -> None:
        if not url.startswith(("data:", "blob:")) and url.split("/")[2].rpartition("@")[2] != home:
            self.foreign.append(url)

    def _said(self, said: Any, expected: Sequence[str]) -> None:
        if said.type in ("error", "warning") and not any(part in said.text for part in expected):
            self.errors.append(said.text)

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        assert not self.foreign, self.foreign
        assert not self.errors, self.errors


@contextmanager
def started() -> Iterator[Any]:
    """A chromium of its own, with a new profile."""
    place = chromium()
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place, args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()


# --- what a person does ----------------------------------------------------------------------------------------------


def dropped(page: Any, *files: tuple[str, str, bytes], event: str = "drop") -> None:
    """Drop (or `paste`) files: (name, type, bytes)."""
    page.evaluate(
        """([files, event]) => {
          const carried = new DataTransfer();
          for (const [name, type, text] of files)
            carried.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, {type}));
          const init = {bubbles: true, cancelable: true};
          if (event === "paste") document.dispatchEvent(new ClipboardEvent("paste", {...init, clipboardData: carried}));
          else for (const one of ["dragenter", "dragover", event])
            document.body.dispatchEvent(new DragEvent(one, {...init, dataTransfer: carried}));
        }""",
        [[[name, kind, base64.b64encode(data).decode()] for name, kind, data in files], event],
    )


def comes(page: Any, true: str) -> None:
    """Wait until this expression is true. (The policy of the page forbids Playwright's own way, which is `eval`.)"""
    end = time.monotonic() + QUIET / 1000
    while not page.evaluate(true):
        assert time.monotonic() < end, true
        page.wait_for_timeout(10)


def asked(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.click("#send")


def answered(page: Any, state: str = "false") -> str:
    """The last answer's text, when it has ended."""
    page.wait_for_selector(f".turn:last-child[aria-busy={state}]")
    return page.inner_text(".turn:last-child .said > .words")


# --- the stub --------------------------------------------------------------------------------------------------------


class Stub:
    """A server by the wire format. `says`: pieces of an answer (text, or an event's JSON, or raw bytes), each let go
    when `gate` is; `bodies` holds what was asked; `left` counts those who went before the end."""

    def __init__(self, votes: Path | None = None, **limits: Any):
        self.limits = Limits(**limits)
        self.models = ["tiny", "other"]
        self.contexts: dict[str, int] = {}
        self.opening = 0
        self.says: list[str | dict[str, Any] | bytes] = ["Four ", "sevens."]
        self.refuses: Refused | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = 0
        self.hold = -1
        self.ends = True
        self.app = self._made(votes)

    def _made(self, votes: Path | None) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.add_exception_handler(Refused, self._refused)
        app.include_router(router(self.limits, votes, name="a stub"))
        app.add_api_route("/v1/models", self._models)
        app.add_api_route("/health", lambda: {})
        app.add_api_route("/v1/chat/completions", self._completions, methods=["POST"])
        return app

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        headers = {"Retry-After": f"{error.retry_after:g}"} if error.retry_after else {}
        return JSONResponse(error.body(), error.status, headers)

    async def _models(self) -> dict[str, Any]:
        if self.opening:
            self.opening -= 1
            raise Refused(503, "the models are being read", code="opening", retry_after=0.3)
        each = [{"id": name, "object": "model", "context": self.contexts.get(name, 4096)} for name in self.models]
        return {"object": "list", "data": each}

    async def _completions(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        if self.refuses:
            raise self.refuses
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            for at, piece in enumerate(self.says):
                while at == self.hold:
                    await asyncio.sleep(0.005)
                yield piece if isinstance(piece, bytes) else event(chunk(piece) if isinstance(piece, str) else piece)
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self.ends:
            yield event(chunk("", reason="stop"))
            yield event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": len(self.says)}})
            yield b"data: [DONE]\n\n"


def chunk(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}]}


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def under(prefix: str, app: Callable[..., Any], slash: bool = True) -> Callable[..., Any]:
    """A proxy of a platform: what is asked under `prefix` is asked of `app` without it; nothing else is there."""

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope["path"]
        if path != prefix and not path.startswith(f"{prefix}/"):
            await JSONResponse({"detail": "not below the prefix"}, 404)(scope, receive, send)
            return
        inner = path.removeprefix(prefix) or "/"
        await app({**scope, "path": inner, "raw_path": inner.encode()}, receive, send)

    return proxy
