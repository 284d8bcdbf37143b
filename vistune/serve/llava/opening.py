"""What a LLaVA worker is told whose beat comes while the models are read: to go on.

The reference's worker never sends another beat after one that was answered with an error, and nobody would know of it
any more. With its next one it finds that it is not known, and registers.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse

from vistune.serve.door.exchange import App, Receive, Scope, Send
from vistune.serve.door.hosts import local


def patient(app: App, reading: Callable[[], bool]) -> App:
    """`app`, but while `reading()` every beat is answered as that of a worker which is known."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        beat = scope["type"] == "http" and scope["method"] == "POST" and local(scope) == "/receive_heart_beat"
        await (JSONResponse({"exist": True}) if beat and reading() else app)(scope, receive, send)

    return answered
