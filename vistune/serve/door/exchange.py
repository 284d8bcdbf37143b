"""One request and its answer as they pass the guard: what is read and sent is counted, timed, and given safe headers.

Knows ASGI's messages, and nothing of what they carry.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vistune.serve.limits import Limits
from vistune.serve.refused import Refused

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LINGER = 5.0
"""Seconds that a client which was refused may go on sending, so that it comes to read why; ..."""
LEAST = 1 << 22
"""... and bytes, or as many as a body may have where those are more."""

SAFE = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"SAMEORIGIN",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
"""Of every answer that does not say otherwise itself, as a page does that has scripts of its own."""


class Held:
    """Bytes of the bodies that are in memory, all requests together."""

    def __init__(self, most: int):
        self.most, self.bytes = most, 0

    def take(self, count: int) -> None:
        """Refused: 429, when they are too many."""
        if self.bytes + count > self.most:
            raise Refused(429, "the server has too many requests in its hands", code="busy", retry_after=1.0)
        self.bytes += count


class Exchange:
    """See the module. `status` is 0 until an answer has begun; `sent` in bytes; `noted` is for who answers to say what
    the log may know (`model`)."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, held: Held):
        self.method: str = scope["method"]
        self.began = time.monotonic()
        self.status = self.sent = 0
        self.refusal: Refused | None = None
        self.closing = False
        self.noted: dict[str, str] = scope.setdefault("vistune", {})
        self._receive, self._send, self._limits, self._held = receive, send, limits, held
        headers: dict[bytes, bytes] = dict(scope["headers"])
        self._whole = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0").strip(b"0") == b""
        self._patient = b"expect" not in headers  # who waits to be told has not begun to send
        self._read = self._counted = 0
        self._over = False

    async def receive(self) -> Message:
        """What the client sends. Refused: 408 when it stalls, 413 when it sends too much, 429 when all of them do."""
        if self._whole:
            return await self._receive()
        try:
            return await self._more()
        except Refused as error:
            self.refusal = error  # who answers may make something else of it
            raise

    async def _more(self) -> Message:
        left = self.began + self._limits.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(min(self._limits.stall, left), 0)):
                message = await self._receive()
        except TimeoutError:
            self._patient = False
            raise Refused(408, "the rest of the request did not come in time", code="stalled") from None
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        count = len(message.get("body", b""))
        self._read += count
        if self._read > self._limits.body:
            raise too_large(self._limits)
        self._held.take(count)
        self._counted += count
        return message

    async def send(self, message: Message) -> None:
        """What the server answers: in its place the refusal, where reading the request came to one."""
        if message["type"] == "http.response.start":
            if self.refusal is not None and not self.status:
                self._over = True
                await self._say(self.refusal)
            elif not self._over:
                await self._start(message)
        elif not self._over:
            await self._body(message)

    async def _start(self, message: Message) -> None:
        self.status = message["status"]
        self.release()
        headers = list(message.get("headers", []))
        there = {name.lower() for name, _ in headers}
        headers += [(name, value) for name, value in SAFE.items() if name not in there]
        if (self.closing or not self._whole) and b"connection" not in there:
            headers.append((b"connection", b"close"))
        await self._send({**message, "headers": headers})

    async def _body(self, message: Message) -> None:
        self.sent += len(message.get("body", b""))
        if self._whole or message.get("more_body", False):
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        await self._linger()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self) -> None:
        """Read on for a while what nobody wants: a connection that is closed with unread bytes in it is reset, and the
        answer is lost on its way."""
        until, left = time.monotonic() + min(LINGER, self._limits.stall), max(LEAST, self._limits.body)
        while self._patient and not self._whole and left > 0:
            try:
                async with asyncio.timeout(max(until - time.monotonic(), 0)):
                    message = await self._receive()
            except TimeoutError:
                return
            left -= len(message.get("body", b""))
            self._whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def refuse(self, error: Refused, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Answer with an error, where no answer has begun."""
        if not self.status:
            self._over = True
            await self._say(error, headers)

    async def _say(self, error: Refused, more: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        body = json.dumps(error.body(), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
        if error.retry_after:
            headers.append((b"retry-after", str(math.ceil(error.retry_after)).encode()))
        await self._start({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._body({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    def release(self) -> None:
        """The request has been read; its bytes are no longer waited for."""
        self._held.bytes -= self._counted
        self._counted = 0


def too_large(limits: Limits) -> Refused:
    return Refused(413, f"a request may have {limits.body} bytes", code="too_large")
