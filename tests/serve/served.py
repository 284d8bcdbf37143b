"""A whole server on the loopback, in a thread of this process, for tests that speak HTTP to it."""

from __future__ import annotations

import importlib
import importlib.util
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from vistune.serve.limits import Limits
from vistune.serve.shelf import Shelf, open_shelf


@dataclass
class Serving:
    """A server that answers at `url` (no slash at its end); `shelf` is what it serves, `name` its first model."""

    url: str
    shelf: Shelf
    app: Any

    @property
    def name(self) -> str:
        return self.shelf.served()[0].name

    @property
    def engine(self) -> Any:
        return self.shelf.engines[0]

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether every row is free and nobody waits, within so many seconds."""
        return until(
            lambda: all(not (s.running or s.waiting) for s in (e.state() for e in self.shelf.engines)), seconds
        )


def until(true: Any, seconds: float = 10.0) -> bool:
    """Whether `true()` within so many seconds."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.005)
    return bool(found)


@contextmanager
def serving(
    *models: Path | str, options: dict[str, Any] | None = None, shelf: dict[str, Any] | None = None, **limits: Any
) -> Iterator[Serving]:
    """`vistune serve` of these models with these limits; `options` go to `server.Options`, `shelf` to `open_shelf`."""
    allowed = Limits(**limits)
    opened = open_shelf([str(model) for model in models], device="cpu", limits=allowed, **(shelf or {}))
    app = application(opened, allowed, options or {})
    opened.start()
    try:
        with listening(app) as url:
            yield Serving(url, opened, app)
    finally:
        opened.stop()


def application(shelf: Shelf, limits: Limits, options: dict[str, Any]) -> Any:
    """What the verb serves; the interface alone as long as there is no `server`."""
    if importlib.util.find_spec("vistune.serve.server") is None:
        api = importlib.import_module("vistune.serve.api")
        metrics = importlib.import_module("vistune.serve.metrics").Metrics()
        media = importlib.import_module("vistune.serve.media").Media(limits)
        return api.create(shelf, limits, metrics, media)
    server = importlib.import_module("vistune.serve.server")
    return server.application(shelf, limits, server.Options(**options))


@contextmanager
def listening(app: Any, names: Sequence[str] = ("127.0.0.1",)) -> Iterator[str]:
    """Any ASGI application on a free port of the loopback."""
    with socket.create_server((names[0], 0), backlog=512) as place:
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        assert until(lambda: server.started, 20)
        try:
            yield f"http://{names[0]}:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
