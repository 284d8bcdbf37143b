"""A guard around a small application, on a free port of the loopback, and a client that sends bytes as they are."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from vistune.serve.door.guard import Guard
from vistune.serve.door.keys import Keys
from vistune.serve.door.listening import configured, on_port
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics

ROOM = 1 << 16


@dataclass
class Small:
    """An application: `/echo` says how long a body is, `/ignore` does not read it, `/flood` sends for ever, `/wait`
    answers when `gate` is set, `/fail` fails, everything else says its path. `paths`: what was let in."""

    paths: list[str] = field(default_factory=list)
    flooding: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.paths.append(path)
        if path == "/fail":
            raise ValueError(scope["query_string"].decode())
        if path == "/flood":
            await self._flood(receive, send)
            return
        said = path
        if path == "/echo":
            said = str(await self._length(receive))
        while path == "/wait" and not self.gate.is_set():
            await asyncio.sleep(0.005)
        scope["vistune"]["model"] = "a model"
        length = [(b"content-length", str(len(said)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": said.encode()})

    async def _length(self, receive: Any) -> int:
        length, more = 0, True
        while more:
            message = await receive()
            length, more = length + len(message.get("body", b"")), message.get("more_body", False)
        return length

    async def _flood(self, receive: Any, send: Any) -> None:
        self.flooding += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watch = asyncio.create_task(self._gone(receive))
        try:
            while not watch.done():
                await send({"type": "http.response.body", "body": b"x" * ROOM, "more_body": True})
                await asyncio.sleep(0)
        finally:
            watch.cancel()
            self.flooding -= 1

    async def _gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue


@dataclass
class Answer:
    """What came back on a connection: the head's status and headers, the body, and whether the other side closed."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@dataclass
class Place:
    port: int
    guard: Guard
    small: Small
    lines: list[str]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, data: bytes) -> Answer:
        """The answer to these bytes."""
        with self.connect() as wire:
            wire.sendall(data)
            return read(wire)

    def get(self, path: str = "/", *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        given = "".join(f"{line}\r\n" for line in headers)
        if not given.lower().startswith("host:"):
            given += f"Host: 127.0.0.1:{self.port}\r\n"
        if body or method == "POST":
            given += f"Content-Length: {len(body)}\r\n"
        return self.ask(f"{method} {path} HTTP/1.1\r\n{given}\r\n".encode("latin-1") + body)


def read(wire: socket.socket) -> Answer:
    """One answer, off a socket: to its length, or, without one, to the end. Status 0: closed without a word."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = wire.recv(ROOM)
        if not piece:
            return Answer(0, {}, data)
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while "content-length" in headers and len(body) < int(headers["content-length"]):
        body += wire.recv(ROOM)
    if headers.get("transfer-encoding") == "chunked":
        while not body.endswith(b"0\r\n\r\n"):
            body += wire.recv(ROOM)
    return Answer(int(first.split()[1]), headers, body)


def closed(wire: socket.socket) -> bool:
    """Whether the other side ends the connection; waits for it up to the socket's timeout."""
    try:
        while wire.recv(ROOM):
            continue
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def until(true: Callable[[], Any], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(true())


@contextmanager
def guarded(keys: tuple[str, ...] = (), options: dict[str, Any] | None = None, **limits: Any) -> Iterator[Place]:
    """`options` go to `Guard`, `limits` to `Limits`."""
    small, lines = Small(), []
    guard = Guard(small, Limits(**limits), Metrics(), keys=Keys(keys), say=lines.append, **(options or {}))
    server = uvicorn.Server(configured(guard))
    place = on_port("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    try:
        assert until(lambda: server.started)
        yield Place(place.getsockname()[1], guard, small, lines)
    finally:
        small.gate.set()
        server.should_exit = True
        thread.join(20)
        place.close()
    assert guard.open == 0 and guard._held.bytes == 0
