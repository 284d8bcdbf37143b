"""What every request passes before anything is done for it: keys, hosts, caps, whether the server is stopping; and the
line that the log gets of it. Plain ASGI: answers stream through as they come.

Knows no routes but those that show whether the server lives.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from urllib.parse import quote

from vistune import console
from vistune.serve.door import hosts
from vistune.serve.door.exchange import App, Exchange, Held, Receive, Scope, Send, too_large
from vistune.serve.door.keys import Keys
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics
from vistune.serve.refused import Refused, described

HEALTH = "/health"
PROBES = (HEALTH, "/ready", "/metrics")
"""Asked by machines all the time: answered at any load and while the server stops; in the log only when amiss."""


class Guard:
    """See the module. `app` is what is guarded, and may be set later; `root` the path prefix under which the server is
    known outside. `names`: hosts under which it may be asked where no key is needed; `anywhere`: it listens on a
    socket that is a file, where hosts say nothing. `draining`: nothing new is begun. `open`: requests in its hands.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        metrics: Metrics,
        *,
        keys: Keys | None = None,
        names: tuple[str, ...] = (),
        root: str = "",
        behind: bool = False,
        anywhere: bool = False,
        say: Callable[[str], None] | None = None,
    ):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.keys, self.names, self.root = keys or Keys(), names, root
        self.behind, self.anywhere, self.say = behind or bool(root), anywhere, say
        self.draining, self.open = False, 0
        self._held = Held(limits.waiting_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.limits, self._held)
        exchange.closing = self.draining
        self.open += 1
        try:
            await self._pass(scope, exchange)
        finally:
            self.open -= 1
            exchange.release()
            self._log(scope, exchange)

    async def _pass(self, scope: Scope, exchange: Exchange) -> None:
        try:
            inner = self._inside(scope)
            refusal = self._refusal(inner, hosts.local(inner))
            if refusal is None:
                await self.app(inner, exchange.receive, exchange.send)
                if exchange.refusal is None or exchange.status:
                    return
                refusal = exchange.refusal
        except Refused as error:
            refusal = error
        except asyncio.CancelledError:
            if not self.draining:
                raise
            refusal = Refused(503, "the server has stopped", code="stopping")
        except Exception as error:  # noqa: BLE001 - the asker is told, the log too, without what was asked
            console.warn(f"a request failed by a fault of the server's: {described(error)}")
            refusal = Refused(500, "the server failed; its log says where", code="internal")
        await self._refuse(scope, exchange, refusal)

    async def _refuse(self, scope: Scope, exchange: Exchange, refusal: Refused) -> None:
        self.metrics.refused(refusal.status, refusal.code)
        exchange.closing |= refusal.status in (400, 403, 413, 408) or self.draining
        await exchange.refuse(refusal, _challenge(scope) if refusal.status == 401 else ())

    def _inside(self, scope: Scope) -> Scope:
        """The request as who answers sees it, whether or not a proxy has taken the prefix away."""
        if not self.root:
            return scope
        path, raw = scope["path"], scope.get("raw_path") or b""
        if path == self.root or path.startswith(self.root + "/"):
            path, raw = path[len(self.root) :], raw.removeprefix(self.root.encode())
        whole = {"path": self.root + (path or "/"), "raw_path": self.root.encode() + (raw or b"/")}
        return {**scope, **whole, "root_path": self.root}

    def _refusal(self, scope: Scope, path: str) -> Refused | None:
        """Why this request is not begun. What it costs to find out does not depend on what it says."""
        headers = scope["headers"]
        if wrong := _malformed(scope, path):
            return Refused(400, wrong, code="malformed")
        if path == HEALTH:
            return None
        if not self.keys.open(headers):
            return Refused(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if not (self.keys or self.anywhere or hosts.known(headers, self.names)):
            said = "this host is not known here: start the server with --api-key, or name it with --allow-host"
            return Refused(403, said, code="unknown_host")
        if scope["method"] not in ("GET", "HEAD") and not hosts.own(headers, self.names, self.behind):
            said = "this page is of another origin: if it is yours, name its host with --allow-host"
            return Refused(403, said, code="foreign_origin")
        return None if path in PROBES else self._no_room(headers)

    def _no_room(self, headers: hosts.Headers) -> Refused | None:
        if self.draining:
            return Refused(503, "the server is stopping", code="stopping", retry_after=self.limits.drain)
        if self.open > self.limits.connections:
            return Refused(503, "too many requests at once", code="busy", retry_after=1.0)
        if int(hosts.one(headers, b"content-length") or 0) > self.limits.body:
            return too_large(self.limits)
        return None

    def _log(self, scope: Scope, exchange: Exchange) -> None:
        """Never a query, a header or a body; what a client may choose freely is cut and escaped."""
        status = exchange.status or 499
        if self.say is None or (status == 200 and hosts.local(self._inside(scope)) in PROBES):
            return
        seconds = time.monotonic() - exchange.began
        path, model = quote(scope["path"][:120]), exchange.noted.get("model", "")
        named = f" {quote(model[:80], safe='/:=@')}" if model else ""
        self.say(f"{scope['method'][:16]} {path} {status} {seconds:.3f}s {exchange.sent}B{named}")


def _malformed(scope: Scope, path: str) -> str:
    """What no client of ours sends, and what two servers in a row may read differently."""
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        return "both Content-Length and Transfer-Encoding"
    if not path.startswith("/"):
        return "the path does not begin with /"
    if re.search(r"[\x00-\x1f\x7f\\]|(^|/)\.\.?(/|$)", path):
        return "the path has . or .. or a backslash or control characters in it"
    return ""


def _challenge(scope: Scope) -> tuple[tuple[bytes, bytes], ...]:
    """A browser that wants a page asks its user; programs are told what they forgot."""
    people = hosts.by_browser(scope["headers"])
    scheme = b'Basic realm="vistune", charset="UTF-8"' if people else b'Bearer realm="vistune"'
    return ((b"www-authenticate", scheme),)
