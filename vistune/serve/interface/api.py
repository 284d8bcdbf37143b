"""The interface of OpenAI's clients: chat completions and the list of models. Every error is in their shape.

Knows nothing of keys, nor of how requests are answered together.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vistune import samples
from vistune.decoding import Settings
from vistune.serve.interface import turns, wire
from vistune.serve.interface.completions import Answer, Desk, Gone, respond, unless_gone
from vistune.serve.interface.faults import handle_errors
from vistune.serve.interface.preparing import Order, prepare
from vistune.serve.interface.wording import Wording
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics
from vistune.serve.pictures.media import Media, Taken
from vistune.serve.refused import Refused
from vistune.serve.shelf import Served, Shelf
from vistune.serve.work import Work

_HEADERS = {"Cache-Control": "no-store"}


def create(shelf: Shelf, limits: Limits, metrics: Metrics, media: Media) -> FastAPI:
    """The application: /v1/chat/completions, /v1/models and /v1/models/{name}, and errors for everything else."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)  # without the first, no page of docs, which is off a CDN
    asking = _Asking(shelf, limits, metrics, media, Desk(limits))
    app.add_api_route("/v1/chat/completions", asking.completions, methods=["POST"], response_model=None)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        await asyncio.to_thread(shelf.look)
        return JSONResponse({"object": "list", "data": [_described(one) for one in shelf.served()]}, headers=_HEADERS)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(_described(await find(shelf, name)), headers=_HEADERS)

    handle_errors(app, metrics)
    return app


async def find(shelf: Shelf, name: str) -> Served:
    """What is called `name`, new adapters too. Refused: 404."""
    try:
        return shelf.find(name)
    except Refused:
        await asyncio.to_thread(shelf.look)
        return shelf.find(name)


def _described(one: Served) -> dict[str, Any]:
    said = {"id": one.name, "object": "model", "created": one.created, "owned_by": "vistune"}
    more = {"context": one.engine.context, "template": one.engine.loaded.template_name, "pictures": True}
    return said | more | ({"parent": one.base} if one.base else {})


@dataclass(frozen=True)
class _Asking:
    """What it takes to answer a request."""

    shelf: Shelf
    limits: Limits
    metrics: Metrics
    media: Media
    desk: Desk

    async def completions(self, request: Request) -> Response:
        came = time.monotonic()
        _check_type(request)
        try:
            body = b"".join([chunk async for chunk in request.stream()])
            parts = [body]
            del body
            wanted, work = await unless_gone(
                request.receive, self._ready(parts, came, request.scope.setdefault("vistune", {}))
            )
            one = Answer(wanted.served, work, self.metrics, came)
            del work
            return await respond(request, one, wanted.words, stream=wanted.stream)
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it

    async def _ready(self, body: list[bytes], came: float, noted: dict[str, str]) -> tuple[_Wanted, Work]:
        """The request as an engine takes it. What it came in, tens of megabytes, is let go of on the way. The log may
        have what is `noted`."""
        asked = await wire.parse(body.pop())
        served = await find(self.shelf, asked.model)
        noted["model"] = served.name
        talk, links = turns.conversation(asked, self.limits), turns.links(asked)
        order = self._order(asked, served, came, tuple(param for param, _ in links))
        wanted = _Wanted(served, bool(asked.stream), Wording(served.name, str(served.created), asked.usage))
        del asked
        with self.desk.place(served):
            try:
                async with asyncio.timeout(order.until - time.monotonic()):
                    taken = await self.media.gather(links) if links else []
                    links.clear()
                    make = functools.partial(_prepared, served, talk, taken, order)
                    return wanted, await self.desk.do(make)
            except TimeoutError:
                raise Refused(504, "making the request ready took too long", code="deadline") from None

    def _order(self, asked: wire.Asked, served: Served, came: float, params: tuple[str, ...]) -> Order:
        most, tokens = self.limits.new_tokens, asked.tokens
        if tokens is not None and tokens > most:
            param = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
            raise Refused(400, f"{param}: at most {most:,} are given", param=param, code="invalid_value")
        settings = Settings(
            max_new_tokens=tokens or min(self.limits.new_tokens_unasked, most),
            temperature=0.0 if asked.greedy else 1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        )
        return Order(
            settings=settings,
            stops=asked.stop or (),
            adapter=served.adapter,
            until=came + self.limits.deadline,
            context=served.engine.context,
            fits=tokens is None,
            params=params,
            timed=self.metrics.picture,
        )


@dataclass(frozen=True)
class _Wanted:
    """Who answers, and how the answer is given."""

    served: Served
    stream: bool
    words: Wording


def _prepared(
    served: Served, talk: Sequence[samples.Message], taken: list[Taken], order: Order, told: threading.Event
) -> Work:
    return prepare(served.engine.loaded, talk, taken, replace(order, told=told))


def _check_type(request: Request) -> None:
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json":
        raise Refused(415, "send the request as JSON: Content-Type: application/json", code="unsupported_media_type")
