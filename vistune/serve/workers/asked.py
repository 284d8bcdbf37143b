"""A request as it came in front: its body, read whole before a worker is chosen, and whether its client is still there.

So a slow sender holds no worker, and what one worker has no room for may be tried with another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vistune.serve.workers.worker import Body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HOP = {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"}
HOP |= {b"trailer", b"trailers", b"transfer-encoding", b"upgrade", b"expect"}
"""Headers that are one connection's own (RFC 9110, 7.6.1)."""
CHECKED = {b"authorization", b"cookie", b"origin", b"content-length", b"x-forwarded-for"}
"""Headers that the guard in front has judged, the length, which is counted anew, and who asked, which is seen here."""


class Gone(Exception):
    """The client went before it had sent everything."""


class Asked:
    """See the module. How large a body may be, and how slow, the guard in front has seen to."""

    def __init__(self, scope: Scope, receive: Receive):
        self.method: str = scope["method"]
        prefix: str = scope.get("root_path", "").rstrip("/")
        self.path: str = scope["path"].removeprefix(prefix) or "/"
        self.headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        query: bytes = scope.get("query_string", b"")
        self.client: str = (scope.get("client") or ("",))[0]
        self.target = (raw.removeprefix(prefix.encode()) or b"/") + (b"?" + query if query else b"")
        self.body = Body()
        self._receive = receive

    async def whole(self) -> None:
        """Read the body. Raises Gone."""
        pieces, more = [], True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        self.body.data = b"".join(pieces)

    async def left(self) -> None:
        """Returns when the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            continue

    def onward(self) -> list[tuple[bytes, bytes]]:
        """The headers for a worker."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in HOP | CHECKED]
        kept += [(b"x-forwarded-for", self.client.encode())] if self.client else []
        return [*kept, (b"content-length", str(len(self.body.data)).encode())] if self.body.data else kept


async def unless_gone(work: Awaitable[None], asked: Asked) -> None:
    """Do the work, and cancel it at once when the client goes; whatever it raises is raised."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(asked.left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
