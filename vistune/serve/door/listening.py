"""Where a server listens, and how it ends: sockets, uvicorn's settings, signals, and the time that answers have left.

Knows nothing of models; what it serves is a guarded application, and what is to be stopped it is told.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from vistune import console
from vistune.serve.door.connection import SPARE, Connection
from vistune.serve.door.guard import Guard

BACKLOG = 2048
KEPT = 65.0
"""Seconds that a connection is kept between requests: longer than clients keep theirs, which then close first."""
HEAD = 1 << 16
"""Bytes of a request's head: platforms in front add cookies of their own."""
LAST = 3.0
"""Seconds for the last events, errors among them, to be sent in, once answers have been ended."""


def on_port(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError where it cannot, with what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    name = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        both = family == socket.AF_INET6 and name == "::" and socket.has_dualstack_ipv6()
        made = socket.create_server((name, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
        # Inherited by connections. asyncio sets it only where a socket was made with its protocol's number, as this one
        # is not; without it the second of two small writes waits 40 ms for the first one's receipt.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--host {host} --port {port}: {said}; choose another, or --port 0 for a free one") from error


def on_file(path: str) -> socket.socket:
    """A Unix socket that only this user may connect to; one that a dead server left there is replaced. ValueError."""
    try:
        _clear(Path(path))
        made = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            made.bind(path)
        finally:
            os.umask(before)
        made.listen(BACKLOG)
    except OSError as error:
        raise ValueError(f"--uds {path}: {error.strerror or error}; name a file in a folder that is there") from error
    return made


def _clear(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise OSError(f"{path} is a file")
    with socket.socket(socket.AF_UNIX) as asked:
        if asked.connect_ex(str(path)) == 0:
            raise OSError("another server listens there")
    path.unlink()


def configured(guard: Guard, **more: Any) -> uvicorn.Config:
    """uvicorn as a server that is open to the world needs it."""
    protocol: Any = partial(Connection, limits=guard.limits, refused=guard.metrics.refused)
    settings: dict[str, Any] = {
        "http": protocol,
        "loop": "asyncio",
        "ws": "none",
        "lifespan": "off",
        "proxy_headers": False,
        "server_header": False,
        "access_log": False,
        "log_config": None,
        "log_level": "error",
        "backlog": BACKLOG,
        "timeout_keep_alive": KEPT,
        "timeout_graceful_shutdown": int(LAST),
        "h11_max_incomplete_event_size": HEAD,
    }
    return uvicorn.Config(guard, **(settings | more))


class Listening(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C, then begins nothing new, lets answers end for `limits.drain` seconds, calls
    `stop` (in a thread; whoever still runs hears an error) and ends. The second signal ends the process at once.

    `ready`: whether there is anything to stop yet; `path`: of a Unix socket, removed at the end. `stuck`, afterwards:
    `stop` has not come to its end.
    """

    def __init__(
        self, guard: Guard, stop: Callable[[], None], ready: Callable[[], bool] = lambda: True, path: str = ""
    ):
        super().__init__(configured(guard))
        self.guard, self.stop, self.ready, self.path = guard, stop, ready, path
        self.asked, self.stuck = 0, False
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.asked:
            _remove(self.path)
            os._exit(128 + sig)
        self.asked = sig
        self.guard.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.asked and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        if self.ready():
            count, seconds = self.guard.open, self.guard.limits.drain
            console.say(f"stopping: {count} requests have {seconds:g} s to end; a second signal ends at once")
            await self._until(lambda: not self.guard.open, seconds)
            stopping = threading.Thread(target=self.stop, daemon=True)
            stopping.start()
            await self._until(lambda: not (self.guard.open or stopping.is_alive()), LAST)
            self.stuck = stopping.is_alive()
        self.should_exit = True

    async def _until(self, true: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not true() and time.monotonic() < end:
            await asyncio.sleep(0.02)


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """As many open files as so many connections need, where the system's hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE + 512
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < wanted:
        console.warn(f"{wanted} open files are needed for {count} connections, and {hard} allowed: ulimit -n")
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _remove(path: str) -> None:
    if path:
        Path(path).unlink(missing_ok=True)


def listen(server: Listening, place: socket.socket) -> None:
    """Serve on `place` until the end, in the main thread where signals are to be heard."""
    try:
        with many_files(server.guard.limits.connections):
            server.run(sockets=[place])
    finally:
        place.close()
        _remove(server.path)
