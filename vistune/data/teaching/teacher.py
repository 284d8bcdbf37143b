"""A model behind an OpenAI-compatible endpoint that is asked for text: plain HTTP, with patience and without leaks.

Knows messages and replies; what is asked, and what a good reply is, it does not know.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistune import console
from vistune.data.fetching.download import AGAIN, BROKEN_NET, Patience, asked_to_wait
from vistune.data.fetching.threads import Stopped

Messages = Sequence[Mapping[str, str]]

ONE_ROW = frozenset({400, 413, 422})  # statuses that speak of this request, not of all of them
THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class TeacherError(ValueError):
    """The endpoint cannot be used as it is called: wrong address, key, model, or it stays away."""


class RequestRefused(ValueError):
    """The endpoint does not take this one request, such as one that is too long for its model."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came: the text, why it ended ("stop", "length", ...), and the tokens that the endpoint counted."""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Where to ask, whom, and how. `options` go into every request; the key is never written anywhere."""

    url: str
    model: str
    options: Mapping[str, Any]
    key: str = field(default="", repr=False)
    patience: Patience = field(default_factory=lambda: Patience(timeout=300.0))

    def body(self, messages: Messages) -> dict[str, Any]:
        """The request as it is sent, and as it is known by."""
        options = {name: value for name, value in self.options.items() if value is not None}
        return {"model": self.model, "messages": [dict(message) for message in messages], **options}

    def ask(self, messages: Messages) -> Reply:
        """One answer. Waits and asks again when the endpoint is busy, limits the rate or drops the connection.

        Raises RequestRefused, TeacherError, Stopped.
        """
        data = json.dumps(self.body(messages)).encode()
        asked, reason = None, ""
        for failed in range(self.patience.tries):
            if self.patience.stop.is_set():
                raise Stopped
            if failed:
                self.patience.pause(failed, asked)
            try:
                return _read(self._post(data))
            except urllib.error.HTTPError as error:
                said = f"{self.url} answered {error.code} {error.reason}: {_start_of(error)}"
                if error.code in ONE_ROW:
                    raise RequestRefused(said) from None
                if error.code not in AGAIN:
                    raise TeacherError(said) from None
                asked, reason = asked_to_wait(error.headers), said
            except (*BROKEN_NET, _NotAnswer) as error:
                asked, reason = None, f"{self.url}: {type(error).__name__.lstrip('_')}: {error}"
        raise TeacherError(f"given up after {self.patience.tries} tries: {reason}")

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "vistune"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        asked = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        opener = urllib.request.build_opener(_Stay)
        with opener.open(asked, timeout=self.patience.timeout) as answer:
            body = bytes(answer.read())
            length = answer.headers.get("Content-Length", "")
        if length.isdigit() and len(body) < int(length):
            raise http.client.IncompleteRead(body, int(length) - len(body))
        return body


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirects: the key would go with them, wherever they lead."""

    def redirect_request(self, *asked: Any) -> None:
        return None


class _NotAnswer(ValueError):
    """The body of a good status is not what the interface promises."""


def endpoint(url: str) -> str:
    """The address that is posted to: `http://host:8000`, `.../v1` and the whole one mean the same.

    Raises ValueError for what is no web address.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url {url!r}: expected an address such as http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def teacher(url: str, model: str, key_variable: str, options: Mapping[str, Any], patience: Patience | None) -> Teacher:
    """A teacher whose key, if it wants one, is in the environment variable `key_variable`."""
    address, key = endpoint(url), os.environ.get(key_variable, "")
    parts = urllib.parse.urlsplit(address)
    if key and parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        console.warn(f"{address}: the key in {key_variable} goes there unencrypted")
    given = {"patience": patience} if patience else {}
    return Teacher(url=address, model=model, key=key, options=options, **given)


def _read(body: bytes) -> Reply:
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        text = choice["message"].get("content")
        usage = answer.get("usage") or {}
        if isinstance(text, list):  # in parts, as some servers answer
            text = "".join(part.get("text", "") for part in text)
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _NotAnswer(f"no chat completion ({type(error).__name__}: {error}): {body[:200]!r}") from None
    return Reply(
        text=THOUGHT.sub("", text or "").strip(),
        finish=str(choice.get("finish_reason") or ""),
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
    )


def _start_of(error: urllib.error.HTTPError) -> str:
    with error:
        return error.read(300).decode(errors="replace").strip()
