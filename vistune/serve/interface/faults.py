"""Whatever fails, as OpenAI's clients read it: refusals, wrong addresses and methods, and faults of our own.

Knows nothing of what was asked: neither an answer nor the log repeats a request's contents.
"""

from __future__ import annotations

import secrets
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vistune import console
from vistune.serve.metrics import Metrics
from vistune.serve.refused import Refused, described


def answered(why: Refused) -> JSONResponse:
    """A refusal as an answer of HTTP."""
    headers = {"Cache-Control": "no-store"}
    if why.retry_after:
        headers["Retry-After"] = str(max(1, round(why.retry_after)))
    return JSONResponse(why.body(), why.status, headers)


def handle_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error of `app` has the shape of OpenAI's from now on, and is counted."""

    async def refused(request: Request, error: Any) -> JSONResponse:
        metrics.refused(error.status, error.code)
        return answered(error)

    async def http(request: Request, error: Any) -> JSONResponse:
        why = _of_http(error.status_code)
        metrics.refused(why.status, why.code)
        found = answered(why)
        found.headers.update(error.headers or {})
        return found

    async def invalid(request: Request, error: Any) -> JSONResponse:
        return await refused(request, Refused(400, "a parameter is not as it should be", code="invalid_value"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_middleware(_Last, metrics=metrics)


def _of_http(status: int) -> Refused:
    said = {404: "there is nothing at this address", 405: "this address does not take this method"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    try:
        phrase = HTTPStatus(status).phrase.lower()
    except ValueError:
        phrase = "error"
    return Refused(status, said.get(status, phrase), code=codes.get(status, phrase.replace(" ", "_")))


class _Last:
    """What nobody else has handled: 500 with a number that is in the log too, beside where it happened. What the
    exception says stays unsaid, since it may hold what was asked."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # noqa: BLE001 - it is in the log, and the asker hears of it
            number = secrets.token_hex(4)
            console.warn(f"error {number}: {described(error)}")
            self.metrics.refused(500, "internal")
            if not began and scope["type"] == "http":
                why = Refused(500, f"a fault of the server's own; its log has more under {number}", code="internal")
                await answered(why)(scope, receive, send)
