"""What machines ask a server about itself: does it live, can it answer, what has it counted.

Knows engines by their states alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from vistune.serve.door.exchange import Receive, Scope, Send
from vistune.serve.door.hosts import local
from vistune.serve.limits import Limits
from vistune.serve.metrics import CONTENT_TYPE, Metrics
from vistune.serve.refused import Refused
from vistune.serve.shelf import Shelf
from vistune.serve.work import State

STILL = 60.0
"""Seconds without a turn of its loop after which an engine with work is not ready: even a CPU reads a page in fewer."""


def states(shelf: Shelf) -> dict[str, State]:
    """What every engine says now, by its name."""
    return {engine.name: engine.state() for engine in shelf.engines}


def router(shelf: Shelf, limits: Limits, metrics: Metrics, draining: Callable[[], bool]) -> APIRouter:
    """`/health`: 503 when an engine is dead, or has work and has not turned for longer than any answer may take.
    `/ready`: whether requests sent now would be answered. `/metrics`: for Prometheus."""
    made = APIRouter()

    @made.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        dead = any(_stands(state, max(limits.deadline, STILL)) for state in states(shelf).values())
        return JSONResponse({"status": "dead" if dead else "ok"}, 503 if dead else 200)

    @made.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> JSONResponse:
        slow = [name for name, state in states(shelf).items() if _stands(state, STILL)]
        said = "draining" if draining() else f"not answering: {', '.join(slow)}" if slow else "ready"
        return JSONResponse({"status": said}, 200 if said == "ready" else 503)

    @made.get("/metrics")
    async def text() -> Response:
        return Response(metrics.text(states(shelf)), headers={"content-type": CONTENT_TYPE})

    return made


def _stands(state: State, seconds: float) -> bool:
    return not state.alive or (state.running + state.waiting > 0 and state.idle > seconds)


async def opening(scope: Scope, receive: Receive, send: Send) -> None:
    """What programs are told while the models are read: the server lives, and is not ready."""
    assert scope["type"] == "http"
    alive = local(scope) == "/health" and scope["method"] in ("GET", "HEAD")
    if not alive:
        raise Refused(503, "the models are being read", code="opening", retry_after=5.0)
    body = json.dumps({"status": "opening"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
