"""A small OpenAI-compatible server on loopback for tests: /v1/models and /v1/chat/completions, misbehaving on order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from time import sleep
from typing import Any

from tests.data.loopback import up

Messages = list[dict[str, Any]]


def echo(messages: Messages) -> str:
    """The text of the last message, whether it is one string or a list of parts."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


@dataclass(kw_only=True)
class OpenAIServer:
    """What the server does, to be changed at any time, and what it was asked.

    `reply` makes a reply's text of the messages (or None: no content); an int is an HTTP status it fails with.
    """

    reply: Callable[[Messages], str | int | None] = echo
    models: list[str] = field(default_factory=lambda: ["tiny"])  # another name is answered 404
    answers_as: str = ""  # what replies say made them; empty: the name that was asked
    key: str = ""  # the only key that is let in; empty: everybody is
    statuses: list[int] = field(default_factory=list)  # answered first, one a request for a completion
    drops: int = 0  # so many of the next requests get no answer at all: the connection is closed
    delay: float = 0.0  # seconds before each answer
    finish: str = "stop"
    raw: tuple[str, bytes] = ("", b"")  # a content type and a body that are sent instead of every reply
    error: dict[str, Any] = field(default_factory=dict)  # more of what the body of a failure says
    url: str = ""  # up to /v1
    asked: Counter[str] = field(default_factory=Counter)  # requests by path
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies of the requests for completions
    keys: list[str] = field(default_factory=list)  # their Authorization headers
    most: int = 0  # completions that were under way at once
    _now: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def completions(self) -> int:
        """How many completions were asked for, failures included."""
        return self.asked["/v1/chat/completions"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: OpenAIServer

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        with self.told._lock:
            self.told.asked[self.path] += 1
        if self.path != "/v1/models":
            self._send(404, _error(f"no {self.path} here"))
            return
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.told.models]
        self._send(200, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        told = self.told
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        with told._lock:
            told.asked[self.path] += 1
            told.requests.append(body)
            told.keys.append(self.headers.get("Authorization", ""))
            told._now += 1
            told.most = max(told.most, told._now)
            status = told.statuses.pop(0) if told.statuses else 200
            dropped, told.drops = told.drops > 0, max(0, told.drops - 1)
        try:
            if told.delay:
                sleep(told.delay)
            if dropped:
                self.close_connection = True
            else:
                self._send(*self._answer(body, status))
        finally:
            with told._lock:
                told._now -= 1

    def _answer(self, body: dict[str, Any], status: int) -> tuple[int, dict[str, Any]]:
        told = self.told
        if self.path != "/v1/chat/completions":
            return 404, _error(f"no {self.path} here")
        if told.key and self.headers.get("Authorization") != f"Bearer {told.key}":
            return 401, _error("wrong key")
        if body["model"] not in told.models:
            return 404, _error(f"no model {body['model']}", code="model_not_found")
        text = status if status != 200 else told.reply(body["messages"])
        if isinstance(text, int):
            return text, _error(f"told to fail with {text}", **told.error)
        message = {"role": "assistant", "content": text}
        return 200, {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": told.answers_as or body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": told.finish}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        kind, written = self.told.raw if self.told.raw[0] else ("application/json", json.dumps(answer).encode())
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(written)))
        if status != 200:
            self.send_header("Retry-After-Ms", "5")  # the client's back-off is seconds otherwise
        self.end_headers()
        self.wfile.write(written)


def _error(said: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": said, "type": "test", "param": None, "code": None} | more}


@contextmanager
def serving(**manners: Any) -> Iterator[OpenAIServer]:
    """Up inside the block, ended with it. `manners`: fields of `OpenAIServer`."""
    told = OpenAIServer(**manners)
    with up(type("Told", (Handler,), {"told": told})) as address:
        told.url = f"{address}/v1"
        yield told
