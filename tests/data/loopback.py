"""A web server on loopback that misbehaves on order: drops connections, lies about lengths, refuses ranges, is busy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


@dataclass(kw_only=True)
class Page:
    """What one path answers. Each list of manners is used up one entry a request; afterwards it behaves."""

    body: bytes = b""
    kind: str = "application/octet-stream"
    statuses: list[int] = field(default_factory=list)  # answered first, without a body
    drops: list[int] = field(default_factory=list)  # bytes of the body after which the connection is cut
    lengths: list[int] = field(default_factory=list)  # Content-Length in place of the true one
    always_says: int | None = None  # a Content-Length that is never true
    ranges: bool = True
    etag: str = '"one"'
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """`pages` by path; `asked` counts requests by path; `log` has (path, Range or "") of each."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.posts: dict[str, Callable[[bytes, dict[str, str]], tuple[int, dict[str, str], bytes]]] = {}
        self.asked: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.lock = Lock()
        self.address = ""

    def link(self, path: str) -> str:
        return self.address + path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Server

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        page = self.told.pages.get(self.path)
        self.send_response(404 if page is None else 302 if "Location" in page.headers else 200)
        for name, value in (page.headers if page else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        told, span = self.told, self.headers.get("Range", "")
        with told.lock:
            told.asked[self.path] += 1
            told.log.append((self.path, span))
            page = told.pages.get(self.path)
            status = 404 if page is None else page.statuses.pop(0) if page.statuses else 200
            drop = page.drops.pop(0) if page and status == 200 and page.drops else None
            length = page.lengths.pop(0) if page and status == 200 and page.lengths else None
        if page is None or status != 200:
            self._empty(status, page)
            return
        first = self._first(page, span)
        if first is None:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(page.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._body(page, first, drop, length)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.told.lock:
            self.told.asked[self.path] += 1
        status, headers, answer = self.told.posts[self.path](body, dict(self.headers))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _empty(self, status: int, page: Page | None) -> None:
        self.send_response(status)
        for name, value in (page.headers if page else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _first(self, page: Page, span: str) -> int | None:
        """The byte to begin with; None: there is none."""
        found = re.fullmatch(r"bytes=(\d+)-", span)
        if not found or not page.ranges or self.headers.get("If-Range", page.etag) != page.etag:
            return 0
        return int(found[1]) if int(found[1]) < len(page.body) else None

    def _body(self, page: Page, first: int, drop: int | None, length: int | None) -> None:
        body = page.body[first:]
        said = length if length is not None else page.always_says if page.always_says is not None else len(body)
        part = bool(first) and page.ranges
        self.send_response(206 if part else 200)
        self.send_header("Content-Type", page.kind)
        if page.etag:
            self.send_header("ETag", page.etag)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{len(page.body) - 1}/{len(page.body)}")
        self.send_header("Content-Length", str(said))
        self.end_headers()
        self.wfile.write(body[: said if drop is None else drop])
        if drop is not None or said != len(body):
            self.close_connection = True


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""


@contextmanager
def up(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on the loopback inside the block, ended with it: its address."""
    server = _Quiet(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving() -> Iterator[Server]:
    """Up inside the block, ended with it."""
    told = Server()
    with up(type("Told", (Handler,), {"told": told})) as told.address:
        yield told
