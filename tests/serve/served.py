"""A whole server on the loopback, in a thread of this process, for tests that speak HTTP to it."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import uvicorn

from vistune.serve import server
from vistune.serve.door.guard import Guard
from vistune.serve.door.listening import configured
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
    app = server.application(opened, allowed, server.Options(**({"log": False} | (options or {}))))
    opened.start()
    try:
        with listening(app) as url:
            yield Serving(url, opened, app)
    finally:
        opened.stop()


@contextmanager
def listening(app: Any, names: Sequence[str] = ("127.0.0.1",), port: int = 0) -> Iterator[str]:
    """Any ASGI application on a free port of the loopback, or on this one."""
    with socket.create_server((names[0], port), backlog=512) as place:
        config = configured(app) if isinstance(app, Guard) else uvicorn.Config(app, log_config=None, lifespan="off")
        config.timeout_graceful_shutdown = 5
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        assert until(lambda: server.started, 20)
        try:
            yield f"http://{names[0]}:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def picture(seed: int = 0, size: tuple[int, int] = (70, 40), kind: str = "PNG") -> bytes:
    """A picture of noise, the same one every time."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    made = io.BytesIO()
    PIL.Image.fromarray(noise).save(made, kind)
    return made.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shows(text: str, *pictures: bytes) -> dict[str, Any]:
    """A user's turn: pictures, then a question about them."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(one)}} for one in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
