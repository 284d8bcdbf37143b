"""What a server under attack is surrounded by: a host with pictures that does its worst, canaries nobody may touch,
files that cost more than they show.

    python benchmarks/serve_made.py serve MODEL ...      `vistune serve` for which the made names lead to the made host

Names are looked up in a table here, and 127.0.0.2 counts as the open Internet; 127.0.0.1 does not.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import io
import json
import os
import runpy
import socket
import ssl
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CERTIFICATES = ROOT / "tests" / "golden" / "serve"
OPEN = "127.0.0.2"
NAMES = {"pictures.test": [OPEN], "inside.test": ["127.0.0.1"], "both.test": [OPEN, "10.0.0.1"], "nowhere.test": []}
IN_OPEN, IN_ACCESS, NONBLOCK = 0x20, 0x1, 0o4000


def launch(words: Sequence[str]) -> None:
    """`vistune` with these words, in this process."""
    sys.path[0] = str(ROOT)
    from vistune.serve.pictures import fetching

    look, public = fetching.looked_up, fetching.public

    def looked_up(name: str, port: int) -> list[str]:
        if name not in NAMES:
            return look(name, port)
        if not NAMES[name]:
            raise socket.gaierror(socket.EAI_NONAME, "nobody knows it")
        return NAMES[name]

    fetching.looked_up = looked_up
    fetching.public = lambda address: address == OPEN or public(address)
    sys.argv = ["vistune", *words]
    runpy.run_module("vistune", run_name="__main__", alter_sys=True)


class PictureHost:
    """pictures.test: a picture at /good.png, and at other paths what a host should not do."""

    def __init__(self, picture: bytes, canary: int):
        self.picture, self.canary, self.port = picture, canary, 0
        self.asked: Counter[str] = Counter()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> PictureHost:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATES / "host.pem")
        self._server = await asyncio.start_server(self._answer, OPEN, 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()

    @property
    def redirects(self) -> dict[str, str]:
        places = [
            f"http://127.0.0.1:{self.canary}/",
            f"https://127.0.0.1:{self.canary}/",
            f"https://localhost:{self.canary}/",
            f"https://inside.test:{self.canary}/",
            f"//[::1]:{self.canary}/",
            "http://169.254.169.254/latest/meta-data",
            "file://localhost/etc/hostname",
            f"https://both.test:{self.port}/good.png",
            "/round",
        ]
        return {f"/away/{number}": place for number, place in enumerate(places)} | {"/round": "/round"}

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            self.asked[path] += 1
            await self._say(path, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            self.asked["left"] += 1
        finally:
            writer.close()

    async def _say(self, path: str, writer: asyncio.StreamWriter) -> None:
        ok, length = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n", len(self.picture)
        if place := self.redirects.get(path):
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())
        elif path == "/good.png":
            writer.write(ok + f"Content-Length: {length}\r\n\r\n".encode() + self.picture)
        elif path == "/short":
            writer.write(ok + f"Content-Length: {length + 9}\r\n\r\n".encode() + self.picture)
        elif path == "/text":
            writer.write(ok + b"\r\nno picture")
        elif path == "/500":
            writer.write(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n")
        elif path == "/endless":
            writer.write(ok + b"\r\n")
            while not writer.is_closing():
                writer.write(bytes(1 << 16))
                await writer.drain()
                await asyncio.sleep(0)  # a drain that need not wait would never hear that the other side has gone
        elif path == "/drip":
            writer.write(ok + b"Content-Length: 99999\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.1)
        else:
            writer.write(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")


class Canary:
    """A server inside: whoever connects to it is counted."""

    def __init__(self) -> None:
        self.hits, self.port = 0, 0
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> Canary:
        self._servers.append(await asyncio.start_server(self._hit, "127.0.0.1", 0))
        self.port = self._servers[0].sockets[0].getsockname()[1]
        if socket.has_ipv6:
            try:
                self._servers.append(await asyncio.start_server(self._hit, "::1", self.port))
            except OSError:
                print("no ::1 here: nothing listens there for a canary")
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()

    async def _hit(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits += 1
        writer.close()


class Secret:
    """A picture in a file of this machine, watched: whoever opens it is counted (Linux; elsewhere `opened` is None)."""

    def __init__(self, path: Path, picture: bytes):
        self.path = path
        path.write_bytes(picture)
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(NONBLOCK) if hasattr(libc, "inotify_init1") else -1
        if self._watch >= 0:
            libc.inotify_add_watch(self._watch, os.fsencode(path), IN_OPEN | IN_ACCESS)

    @property
    def opened(self) -> int | None:
        """Times since it was asked last."""
        if self._watch < 0:
            return None
        try:
            return len(os.read(self._watch, 1 << 16)) // 16
        except BlockingIOError:
            return 0


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    """A PNG that says it is so large, of one bit a pixel, whatever rows it has."""
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


def bombs() -> dict[str, bytes]:
    """Small files that would cost their reader time or memory; all have to be refused."""
    inflating = zlib.compress(bytes(4 << 20), 9)
    canvas = b"WEBPVP8X" + struct.pack("<IIHBHB", 10, 2, 16382, 0, 16382, 0)
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0)
    )
    return {
        "12,000 x 12,000 pixels in 17 kB": png(12_000, 12_000, rows=bytes(1501 * 12_000)),
        "1 x 30,000,000": png(1, 30_000_000),
        "2^31 a side": png(2**31 - 1, 2**31 - 1),
        "profiles that inflate, and no pixels": png(0, 8, *[chunk(b"iCCP", b"x\0\0" + inflating)] * 30),
        "parts without end": png(8, 8, chunk(b"tEXt", b"") * 120_000, rows=bytes(16)),
        "a WebP's canvas": b"RIFF" + struct.pack("<I", len(canvas)) + canvas,
        "a GIF's canvas": gif + b"\x02\x02\x4c\x01\x00\x3b",
        "scans without end": jpeg[:-2] + scan * 500 + jpeg[-2:],
        "half a picture": jpeg[: len(jpeg) // 2],
    }


def picture(seed: int = 0, width: int = 96, height: int = 72) -> Any:
    # numpy and Pillow are imported late: what `launch` starts sets numpy's threads before it imports it
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(seed: int, form: str = "PNG", width: int = 96, height: int = 72) -> bytes:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, form)
    return buffer.getvalue()


def as_json(said: object) -> bytes:
    return json.dumps(said).encode()


if __name__ == "__main__":
    launch(sys.argv[1:])
