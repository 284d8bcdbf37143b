"""The addresses of LLaVA's controller and of its workers, all of them here: a client that knows one finds the other.

Knows HTTP; who is asked is the controller's affair.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from vistune import console
from vistune.serve.interface.completions import Desk, Gone
from vistune.serve.limits import Limits
from vistune.serve.llava import lines
from vistune.serve.llava.addresses import worker_address
from vistune.serve.llava.answering import Answering, refused
from vistune.serve.llava.controller import Controller
from vistune.serve.llava.others import Others
from vistune.serve.llava.status import Status, queue_length, read_status
from vistune.serve.metrics import Metrics
from vistune.serve.pictures.media import Media
from vistune.serve.refused import Refused
from vistune.serve.shelf import Shelf

MOST_BODY = 1 << 20
"""Bytes of what is said to a controller."""


def own_status(shelf: Shelf) -> Status:
    """Ours: every model and adapter, and the requests that all engines have."""
    states = [engine.state() for engine in shelf.engines]
    return Status(tuple(one.name for one in shelf.served()), 1.0, float(sum(s.running + s.waiting for s in states)))


def router(
    shelf: Shelf,
    limits: Limits,
    metrics: Metrics,
    media: Media,
    *,
    dispatch: str = "shortest_queue",
    hosts: Sequence[str] = (),
    address: str = "",
) -> APIRouter:
    """All of the protocol. `dispatch`: how a worker is chosen where several have a model; `hosts`: beside the loopback,
    from which workers may register; `address`: ours, as clients reach it, where it is another than they asked at.
    ValueError for a dispatch that is none."""
    said = _Said(shelf, Controller(lambda: own_status(shelf), dispatch), Others(limits.deadline), tuple(hosts), address)
    answering = Answering(shelf, limits, metrics, media, Desk(limits))
    made = APIRouter(include_in_schema=False)

    @made.post("/worker_generate_stream")
    async def generate(request: Request) -> Response:
        return await said.generate(request, answering)

    routes: dict[str, Callable[[Request], Any]] = {
        "/register_worker": said.register,
        "/receive_heart_beat": said.beat,
        "/refresh_all_workers": said.refresh,
        "/list_models": said.models,
        "/get_worker_address": said.address,
        "/worker_get_status": said.status,
    }
    for path, route in routes.items():
        made.add_api_route(path, _json(route), methods=["POST"], response_model=None)
    return made


def _json(route: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> JSONResponse:
        return JSONResponse(await route(request), headers={"Cache-Control": "no-store"})

    return answer


class _Said:
    """What is said to the controller, and what it says."""

    def __init__(self, shelf: Shelf, controller: Controller, others: Others, hosts: Sequence[str], own: str):
        self.shelf, self.controller, self.others, self.hosts, self.own = shelf, controller, others, hosts, own

    async def register(self, request: Request) -> None:
        """Who is refused is named in the log too: the reference's worker does not read why, and ends."""
        fields = await _fields(request)
        try:
            address = worker_address(fields.get("worker_name"), self.hosts)
            told = fields.get("worker_status")
            status = read_status(told) if told else await self.others.status(address)
            self.controller.register(address, status, bool(fields.get("check_heart_beat")))
        except Refused as why:
            console.warn(f"a LLaVA worker is not registered: {why.message}")
            raise

    async def beat(self, request: Request) -> dict[str, bool]:
        fields = await _fields(request)
        address = worker_address(fields.get("worker_name"), self.hosts)
        return {"exist": self.controller.beat(address, queue_length(fields.get("queue_length")))}

    async def refresh(self, request: Request) -> None:
        """Ask every worker how it is; who does not say is forgotten. Those that are there stay so meanwhile."""
        asked = dict(self.controller.known)
        answers = await asyncio.gather(*map(self.others.status, asked), return_exceptions=True)
        for (address, one), status in zip(asked.items(), answers, strict=True):
            if isinstance(status, Status):
                self.controller.register(address, status, one.beats)
            elif isinstance(status, Refused):
                self.controller.forget(address)
            else:
                raise status

    async def models(self, request: Request) -> dict[str, list[str]]:
        await asyncio.to_thread(self.shelf.look)
        return {"models": self.controller.models()}

    async def address(self, request: Request) -> dict[str, str]:
        return {"address": self.controller.choose(_name(await _fields(request)), self._here(request))}

    async def status(self, request: Request) -> dict[str, Any]:
        return self.controller.whole().body()

    def _here(self, request: Request) -> str:
        """Where this client reached us: there it finds the worker too."""
        return self.own or str(request.base_url).rstrip("/")

    async def generate(self, request: Request, answering: Answering) -> Response:
        """Answered here where the model is ours, else by who has it."""
        try:
            body = [b"".join([piece async for piece in request.stream()])]
            name = _name(await asyncio.to_thread(_object, body[0]))
            chosen = self._chosen(name)
            if chosen:
                return await self.others.respond(request, body.pop(), chosen)
            served = await asyncio.to_thread(self._found, name)
            return await answering.respond(request, body, served)
        except (Gone, ClientDisconnect):
            return Response(status_code=499)
        except Refused as why:
            answering.metrics.refused(why.status, why.code)
            return refused(why, lines.NO_WORKER if why.status == 404 else lines.FAILED)

    def _chosen(self, name: str) -> str:
        """The address of another worker, where only others have the model: who asks us for ours has been sent to us."""
        ours = not name or name in self.controller.own().model_names
        return "" if ours else self.controller.choose(name, "")

    def _found(self, name: str) -> Any:
        """Of ours; the first where none is named, as a worker of the reference has but one."""
        self.shelf.look()
        return self.shelf.find(name or self.shelf.served()[0].name)


async def _fields(request: Request) -> dict[str, Any]:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY:
            raise Refused(413, f"this may have {MOST_BODY} bytes", code="too_large")
    return _object(body)


def _object(body: bytes) -> dict[str, Any]:
    """Refused: 400 where it is no object of JSON."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "an object of JSON is needed", code="invalid_json")
    return found


def _name(fields: dict[str, Any]) -> str:
    said = fields.get("model") or ""
    if not isinstance(said, str) or len(said) > 300:
        raise Refused(400, "model: a name", param="model", code="invalid_value")
    return said
