"""What the process in front answers itself, health, readiness, metrics, and what it passes on: everything else.

Knows nothing of processes, and nothing of keys and caps, which stand around it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from vistune import console
from vistune.serve.refused import Refused
from vistune.serve.workers.asked import Asked, Gone, Receive, Scope, Send, unless_gone
from vistune.serve.workers.merged import merged
from vistune.serve.workers.passing import Cut, Passing
from vistune.serve.workers.worker import Worker

SCRAPE = 5.0
"""Seconds that a worker may take to give its metrics; whose do not come are left out."""
TOLD_TO_ALL = {"/register_worker", "/receive_heart_beat", "/refresh_all_workers"}
"""What LLaVA's workers tell their controller: every worker of ours is one, and has to know."""
PLAIN = "text/plain; version=0.0.4; charset=utf-8"


class Front:
    """An ASGI application. `own` gives metrics of the process in front, as Prometheus writes them; `draining` says
    whether an end has been asked for."""

    def __init__(
        self,
        workers: Sequence[Worker],
        own: Callable[[], str] = lambda: "",
        draining: Callable[[], bool] = lambda: False,
    ):
        self.workers, self.passing = list(workers), Passing(workers)
        self.own, self.draining = own, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise AssertionError("a server without lifespan and websockets")
        asked = Asked(scope, receive)
        began = False

        async def told(message: Any) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await asked.whole()
            await unless_gone(self._answer(asked, told), asked)
        except (Gone, Cut):
            return  # the server closes the connection of an answer that is not whole
        except Refused as error:
            assert not began, "an answer that has begun is ended by whoever began it"
            await _json(send, error.status, error.body(), error.retry_after)

    async def _answer(self, asked: Asked, send: Send) -> None:
        own = {"/health": self._health, "/ready": self._ready, "/metrics": self._metrics}.get(asked.path)
        if own and asked.method in ("GET", "HEAD"):
            await own(send)
        elif asked.path in TOLD_TO_ALL:
            await self.passing.all(asked, send)
        else:
            await self.passing.one(asked, send)

    def opening(self) -> bool:
        """Whether no worker is ready yet, and one is reading its models."""
        return not any(one.ready for one in self.workers) and any(one.state == "starting" for one in self.workers)

    async def _health(self, send: Send) -> None:
        await _json(send, 200, {"status": "ok"})

    async def _ready(self, send: Send) -> None:
        """200 as long as one worker can answer and no end has been asked for; which ones can is said."""
        ready = any(one.ready for one in self.workers) and not self.draining()
        said = {str(one.number): one.state for one in self.workers}
        status = "draining" if self.draining() else "ready" if ready else "not ready"
        await _json(send, 200 if ready else 503, {"status": status, "workers": said})

    async def _metrics(self, send: Send) -> None:
        there = [one for one in self.workers if one.ready]
        texts = await asyncio.gather(*map(_scraped, there))
        found = {"front": self.own()} | {str(one.number): text for one, text in zip(there, texts, strict=True)}
        await _sent(send, 200, PLAIN, (merged(found) + self._counted()).encode())

    def _counted(self) -> str:
        """The front's own metrics, whose names no worker has."""
        up = {one: float(one.ready) for one in self.workers}
        text = _gauge("vistune_worker_up", "1 while the worker takes requests.", up)
        text += _gauge(
            "vistune_worker_requests", "Requests that the worker has now.", {w: w.busy for w in self.workers}
        )
        return text + _gauge("vistune_worker_starts", "How often it was started.", {w: w.starts for w in self.workers})


def _gauge(name: str, said: str, values: Mapping[Worker, float]) -> str:
    lines = [f"# HELP {name} {said}", f"# TYPE {name} gauge"]
    return "\n".join([*lines, *(f'{name}{{worker="{one.number}"}} {value}' for one, value in values.items())]) + "\n"


async def _scraped(worker: Worker) -> str:
    try:
        answer = await worker.get("/metrics", SCRAPE)
    except httpx.HTTPError as error:
        console.warn(f"worker {worker.number} gives no metrics: {type(error).__name__}")
        return ""
    return answer.text if answer.status_code == 200 else ""


async def _json(send: Send, status: int, body: Mapping[str, Any], retry_after: float = 0.0) -> None:
    more = [(b"retry-after", str(max(1, round(retry_after))).encode())] if retry_after else []
    await _sent(send, status, "application/json", json.dumps(body).encode(), more)


async def _sent(send: Send, status: int, kind: str, body: bytes, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
