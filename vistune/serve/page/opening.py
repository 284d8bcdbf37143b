"""The page that a browser gets while the models are read: it says so, and becomes the chat page by itself.

Knows nothing of models: whether they are being read it is told.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from vistune.serve.door.exchange import App, Receive, Scope, Send
from vistune.serve.door.hosts import by_browser, local
from vistune.serve.page import HEADERS, HTML, at, files, sent, written

AGAIN = 5
"""Seconds after which to come again, for whoever heeds `Retry-After`; the page itself looks more often."""


def meanwhile(app: App, reading: Callable[[], bool] = lambda: True) -> App:
    """`app`, but while `reading()` a browser that asks for the page gets one that waits for it, and the page's files.

    Whatever else is asked, and whoever else asks, is answered by `app`.
    """
    there, text = files(), written("opening.html")
    headers = {**HEADERS, "Cache-Control": "no-store", "Retry-After": str(AGAIN)}

    def shown(request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return None
        path = local(request.scope)
        if path == "/" and by_browser(request.scope["headers"]):
            return Response(at(text, request.scope.get("root_path", "")), 503, headers, HTML)
        found = there.get(path.removeprefix("/page/"))
        return sent(request, found) if found else None

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        found = shown(Request(scope)) if reading() else None
        await (found or app)(scope, receive, send)

    return answered
