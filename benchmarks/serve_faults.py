"""What is sent to a server in a soak: good requests, and twenty kinds of faults with what each has to be answered.

Knows no server of its own: a `Target` says where everything is. Raw sockets, since no client misbehaves on order.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from serve_made import as_json, bombs, data_url, saved

WORDS = ("Describe the picture.", "What is this?", "Tell me about the colours.", "What stands on the left?", "Why?")
CUT = "cut"
"""Stands for a status where the connection ended without one."""
LEFT = "left"
"""Where the client went by itself."""
Said = int | str


@dataclass
class Target:
    """Where everything is. `stall`: seconds after which the server cuts who is slow; `body`: the longest in bytes."""

    port: int
    key: str
    model: str
    host: int
    canary: int
    secret: str
    stall: float
    body: int
    pictures: list[str] = field(default_factory=lambda: [data_url(saved(seed)) for seed in range(12)])
    bombs: dict[str, bytes] = field(default_factory=bombs)


@dataclass
class Reply:
    status: Said
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, at: Target) -> Wire:
        return cls(*await asyncio.open_connection("127.0.0.1", at.port, limit=1 << 20))

    def close(self, hard: bool = False) -> None:
        """`hard`: with a reset."""
        if hard:
            self.writer.transport.abort()
        self.writer.close()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> Reply:
        try:
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (OSError, asyncio.IncompleteReadError):
            return Reply(CUT)
        pairs = (line.partition(":") for line in lines if line)
        return Reply(int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs})

    async def pieces(self, reply: Reply) -> AsyncIterator[bytes]:
        """The body as it comes. IncompleteReadError when it is cut."""
        if reply.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif length := int(reply.headers.get("content-length", 0)):
            yield await self.reader.readexactly(length)

    async def answer(self) -> Reply:
        """Status, headers and body; what is cut in the body is `CUT`."""
        reply = await self.head()
        try:
            reply.body = b"".join([piece async for piece in self.pieces(reply)])
        except (OSError, asyncio.IncompleteReadError):
            reply.status = CUT
        return reply

    async def ask(self, head: bytes, body: bytes = b"") -> Reply:
        try:
            await self.send(head + body)
        except OSError:
            return await self.answer()  # refused before all was sent
        return await self.answer()


def head(
    at: Target, length: int | None, *more: str, method: str = "POST", path: str = "", key: str | None = None
) -> bytes:
    lines = [f"{method} {path or '/v1/chat/completions'} HTTP/1.1", "Host: 127.0.0.1", *more]
    lines += [f"Authorization: Bearer {at.key if key is None else key}"] if key != "" else []
    lines += ["Content-Type: application/json"] if method == "POST" else []
    lines += [f"Content-Length: {length}"] if length is not None else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def asking(at: Target, *urls: str, words: str = WORDS[0], **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": words}]}]
    return {"model": at.model, "messages": messages, "max_tokens": 16, "temperature": 0.0} | more


# Good requests: what is asked, by a name under which equal ones are told


def good(at: Target, draw: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Kind, the name of this very question, and the body; half of them as a stream. All are greedy."""
    kind = draw.choices(("text", "picture", "several turns", "fetched"), (3, 5, 3, 1))[0]
    number, words, tokens = draw.randrange(len(at.pictures)), draw.choice(WORDS), draw.choice((8, 16, 48))
    if kind == "text":
        asked = asking(at, words=words)
    elif kind == "picture":
        asked = asking(at, at.pictures[number], words=words)
    elif kind == "fetched":
        number, asked = 0, asking(at, f"https://pictures.test:{at.host}/good.png", words=words)
    else:
        first = asking(at, at.pictures[number], at.pictures[0])["messages"]
        turns = [*first, {"role": "assistant", "content": "A thing."}, {"role": "user", "content": words}]
        asked = asking(at) | {"messages": turns}
    stream = draw.random() < 0.5
    asked |= {"max_tokens": tokens, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    return kind, f"{kind} {number} {words} {tokens}", asked


def heard(reply: Reply, stream: bool) -> tuple[str, int]:
    """Text and tokens of a good request's answer. ValueError when it is no whole answer."""
    if not stream:
        said = json.loads(reply.body)
        return said["choices"][0]["message"]["content"], said["usage"]["completion_tokens"]
    events = [line.removeprefix("data: ") for line in reply.body.decode().split("\n\n") if line.startswith("data: ")]
    if not events or events.pop() != "[DONE]":
        raise ValueError("a stream without an end")
    pieces = [json.loads(event) for event in events]
    if wrong := [piece for piece in pieces if "error" in piece]:
        raise ValueError(f"an error in a stream: {wrong[0]}")
    text = "".join(one["delta"].get("content") or "" for piece in pieces for one in piece["choices"])
    return text, pieces[-1]["usage"]["completion_tokens"]


# Faults that are a whole request with a body: how it is made, and the statuses it may get

Made = Callable[[Target, random.Random], bytes]


def with_pictures(*urls: Callable[[Target], str]) -> Made:
    return lambda at, draw: as_json(asking(at, draw.choice(urls)(at), stream=draw.random() < 0.5))


def changed(*changes: Callable[[Target], dict[str, Any]]) -> Made:
    return lambda at, draw: as_json(asking(at) | draw.choice(changes)(at))


def bomb(at: Target, draw: random.Random) -> bytes:
    return as_json(asking(at, data_url(draw.choice(list(at.bombs.values())))))


def nested(at: Target, draw: random.Random) -> bytes:
    depth = draw.choice((200, 5_000, 500_000))
    return draw.choice(
        (
            b"[" * depth,
            b'{"a":' * depth,
            b"[" * depth + b"]" * depth,
            as_json(asking(at)).replace(b"16", b"[" * depth + b"]" * depth),
        )
    )


LOOPBACK = with_pictures(
    lambda at: f"http://127.0.0.1:{at.canary}/",
    lambda at: f"http://localhost:{at.canary}/a.png",
    lambda at: f"http://[::1]:{at.canary}/",
    lambda at: f"http://2130706433:{at.canary}/",
    lambda at: f"https://127.0.0.1:{at.canary}/",
    lambda at: f"https://localhost:{at.canary}/",
    lambda at: f"https://LOCALHOST.:{at.canary}/",
    lambda at: f"https://inside.test:{at.canary}/",
    lambda at: f"https://0x7f.1:{at.canary}/",
    lambda at: f"https://[::1]:{at.canary}/",
    lambda at: f"https://[::ffff:127.0.0.1]:{at.canary}/",
    lambda at: f"https://pictures.test:{at.host}@127.0.0.1:{at.canary}/",
    lambda at: f"https://pictures.test:{at.host}\\@127.0.0.1:{at.canary}/",
    lambda at: f"https://127.0.0.1:{at.canary}#@pictures.test:{at.host}/",
    lambda at: f"https://both.test:{at.host}/good.png",
    lambda at: "http://169.254.169.254/latest/meta-data",
)
PATHS = with_pictures(
    lambda at: at.secret,
    lambda at: f"file://{at.secret}",
    lambda at: f"FILE://localhost{at.secret}",
    lambda at: f"../../../../../../../..{at.secret}",
    lambda at: f"data:image/png,{at.secret}",
    lambda at: "/dev/zero",
    lambda at: "/proc/self/environ",
    lambda at: "",
)
REDIRECTED = with_pictures(
    *(lambda at, number=number: f"https://pictures.test:{at.host}/away/{number}" for number in range(9))
)
BAD_HOST = with_pictures(
    *(
        lambda at, path=path: f"https://pictures.test:{at.host}/{path}"
        for path in ("drip", "endless", "short", "text", "500", "404")
    ),
    lambda at: f"https://nowhere.test:{at.host}/good.png",
)
BAD_BASE64 = with_pictures(
    lambda at: "data:image/png;base64,!!!!",
    lambda at: at.pictures[0][:-1],
    lambda at: at.pictures[0][:200] + "\n" + at.pictures[0][200:],
    lambda at: at.pictures[0].replace("+", "-").replace("/", "_").replace("image_png", "image/png"),
    lambda at: at.pictures[0] + "====",
    lambda at: "data:image/png;base64,",
)
NO_PICTURE = with_pictures(
    lambda at: data_url(saved(0, "BMP")),
    lambda at: data_url(saved(0, "TIFF")),
    lambda at: data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"),
    lambda at: data_url(random.Random(0).randbytes(5000)),
    lambda at: data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
)
UNKNOWN = changed(
    lambda at: {"functions": [{"name": "a"}]},
    lambda at: {"top_k": 3},
    lambda at: {"__class__": {}},
    lambda at: {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
    lambda at: {"messages": [{"role": "user", "content": "a", "trusted": True}]},
    lambda at: {"messages": "a"},
    lambda at: {"messages": []},
)
TOO_MUCH = changed(
    lambda at: asking(at, *at.pictures, *at.pictures),
    lambda at: {"n": 5},
    lambda at: {"max_tokens": 10**9},
    lambda at: {"max_tokens": -1},
    lambda at: {"temperature": 99},
    lambda at: {"stop": ["a"] * 10},
    lambda at: {"messages": [{"role": "user", "content": "a"}] * 1000},
    lambda at: asking(at, words="long " * 200_000),
)
NO_JSON: Made = lambda at, draw: draw.choice((b"", b"\xff\xfe", b"{", b"null", b'{"model": NaN}', draw.randbytes(300)))  # noqa: E731
WRONG_MODEL = changed(
    lambda at: {"model": "gpt-4"}, lambda at: {"model": f"../{at.model}"}, lambda at: {"model": at.secret}
)

POSTED: dict[str, tuple[Made, set[Said]]] = {
    "bomb": (bomb, {400}),
    "bad base64": (BAD_BASE64, {400}),
    "no picture": (NO_PICTURE, {400}),
    "SSRF at loopback": (LOOPBACK, {400, 403}),
    "SSRF through redirects": (REDIRECTED, {400, 403}),
    "local path": (PATHS, {400}),
    "bad host": (BAD_HOST, {400, 413, 502, 504}),
    "unknown field": (UNKNOWN, {400}),
    "too much": (TOO_MUCH, {400}),
    "nested JSON": (nested, {400}),
    "no JSON": (NO_JSON, {400}),
    "wrong model": (WRONG_MODEL, {404}),
}
DELIBERATE: dict[str, set[Said]] = {"bad host": {502, 504}}
"""5xx that say what another host does."""


# Faults of a connection


async def left_at_once(at: Target, draw: random.Random) -> Reply:
    """Gone before anything is answered."""
    wire, body = await Wire.open(at), as_json(asking(at, draw.choice(at.pictures), max_tokens=200))
    await wire.send(head(at, len(body)) + body)
    await asyncio.sleep(draw.random() * 0.2)
    wire.close(hard=draw.random() < 0.5)
    return Reply(LEFT)


async def left_in_a_stream(at: Target, draw: random.Random) -> Reply:
    wire = await Wire.open(at)
    body = as_json(asking(at, draw.choice(at.pictures), max_tokens=200, stream=True))
    await wire.send(head(at, len(body)) + body)
    reply, heard_of = await wire.head(), draw.randrange(1, 20)
    try:
        async for _ in wire.pieces(reply):
            if not (heard_of := heard_of - 1):
                break
    except (OSError, asyncio.IncompleteReadError):
        reply.status = CUT
    wire.close(hard=draw.random() < 0.5)
    return Reply(LEFT if reply.status == 200 else reply.status)


async def left_while_sending(at: Target, draw: random.Random) -> Reply:
    wire, body = await Wire.open(at), as_json(asking(at, draw.choice(at.pictures)))
    await wire.send(head(at, len(body)) + body[: draw.randrange(len(body))])
    wire.close(hard=draw.random() < 0.5)
    return Reply(LEFT)


async def long_said(at: Target, draw: random.Random) -> Reply:
    wire = await Wire.open(at)
    reply = await wire.ask(head(at, draw.choice((at.body + 1, 10**12))))
    wire.close()
    return reply


async def long_in_chunks(at: Target, draw: random.Random) -> Reply:
    """More than is taken, its length never said."""
    wire, piece = await Wire.open(at), b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
    try:
        await wire.send(head(at, None, "Transfer-Encoding: chunked"))
        for _ in range(at.body // (1 << 16) + 64):
            await wire.send(piece)
    except OSError:
        reply = await wire.answer()
    else:
        reply = await wire.answer()
    wire.close()
    return reply


async def wrong_key(at: Target, draw: random.Random) -> Reply:
    wire, body = await Wire.open(at), as_json(asking(at, at.pictures[0]))
    method, path = draw.choice((("POST", ""), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/"), ("GET", "/x")))
    key = draw.choice(("", "wrong", at.key[:-1], at.key + "x", "\u00e9"))
    body = body if method == "POST" else b""
    reply = await wire.ask(head(at, len(body), method=method, path=path, key=key), body)
    wire.close()
    return reply


async def slow_reader(at: Target, draw: random.Random) -> Reply:
    """Asks for a stream and takes nothing of it."""
    wire = await Wire.open(at)
    body = as_json(asking(at, max_tokens=200, stream=True))
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await wire.send(head(at, len(body)) + body)
    await asyncio.sleep(draw.random() * at.stall)
    wire.close(hard=True)
    return Reply(LEFT)


async def slow_sender(at: Target, draw: random.Random) -> Reply:
    """Says it will send a body, and sends half of it."""
    wire, body = await Wire.open(at), as_json(asking(at, at.pictures[0]))
    await wire.send(head(at, len(body)) + body[: len(body) // 2])
    reply = await wire.answer()
    wire.close()
    return reply


async def no_http(at: Target, draw: random.Random) -> Reply:
    wire = await Wire.open(at)
    junk = (
        draw.randbytes(200) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + draw.randbytes(500),
    )
    reply = await wire.ask(draw.choice((*junk, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n")))
    wire.close(hard=True)
    return reply


async def wrong_address(at: Target, draw: random.Random) -> Reply:
    paths = (
        "/v1/nothing",
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/static/../../x",
        "/v1/models/x/y",
    )
    wire, method = await Wire.open(at), draw.choice(("GET", "DELETE", "PUT"))
    reply = await wire.ask(head(at, 0, method=method, path=draw.choice(paths)))
    wire.close()
    return reply


async def long_head(at: Target, draw: random.Random) -> Reply:
    wire = await Wire.open(at)
    reply = await wire.ask(head(at, 0, *["X-Long: " + "a" * 1000] * 200))
    wire.close(hard=True)
    return reply


CONNECTED: dict[str, tuple[Callable[[Target, random.Random], Awaitable[Reply]], set[Said]]] = {
    "left at once": (left_at_once, {LEFT}),
    "left in a stream": (left_in_a_stream, {LEFT}),
    "left while sending": (left_while_sending, {LEFT}),
    "body too long, as it says": (long_said, {413}),
    "body too long, in chunks": (long_in_chunks, {413, CUT}),
    "wrong key": (wrong_key, {401}),
    "slow reader": (slow_reader, {LEFT}),
    "slow sender": (slow_sender, {408, CUT}),
    "no HTTP": (no_http, {400, CUT}),
    "wrong address": (wrong_address, {400, 404, 405}),
    "head too long": (long_head, {400, 431, CUT}),
}
FAULTS: dict[str, set[Said]] = {name: said for name, (_, said) in (*POSTED.items(), *CONNECTED.items())}


async def fault(at: Target, kind: str, draw: random.Random) -> Reply:
    """One of `FAULTS`, on a connection of its own."""
    if kind in CONNECTED:
        return await CONNECTED[kind][0](at, draw)
    body = POSTED[kind][0](at, draw)
    wire = await Wire.open(at)
    try:
        return await wire.ask(head(at, len(body)), body)
    finally:
        wire.close()
