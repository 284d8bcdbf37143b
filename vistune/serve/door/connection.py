"""One connection: how long a request's head may take to come, and an answer to go; what is no HTTP gets an error that
clients can read.

Knows nothing of what is asked. uvicorn times neither, and keeps a connection whose client reads nothing for ever.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vistune.serve.limits import Limits
from vistune.serve.refused import Refused

SPARE = 64
"""Connections beyond those whose requests are answered, so that there are some to say that on."""
SLOWEST = 4096
"""Bytes of an answer that a client has to take within `limits.stall`, where so many wait to be sent."""


class Connection(H11Protocol):
    """See the module. `refused`: told of what never came to be a request, its status and code."""

    def __init__(self, *args: Any, limits: Limits, refused: Callable[[int, str], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limits, self.refused = limits, refused
        self._waits: float | None = None
        self._unsent, self._unsent_since = 0, 0.0
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections + SPARE:
            self._answer(Refused(503, "too many connections", code="busy", retry_after=1.0))
            return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._clock:
            self._clock.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """Much was taken; that as much may soon wait again is no matter."""
        self._unsent = 0
        super().resume_writing()

    def _look(self) -> None:
        """Again and again, as long as the connection is there: one timer is cheaper than one for each thing timed."""
        self._clock = self.loop.call_later(self.limits.stall / 5, self._look)
        now = time.monotonic()
        if self._takes_nothing(now):
            self.transport.abort()
        elif self._says_nothing(now) and not self.transport.is_closing():
            self._answer(Refused(408, "the request did not come in time", code="stalled"))

    def _takes_nothing(self, now: float) -> bool:
        """Whether what waits to be sent has hardly become less for too long."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent <= self._unsent - SLOWEST or not self._unsent:
            self._unsent, self._unsent_since = unsent, now
        return unsent > 0 and now - self._unsent_since > self.limits.stall

    def _says_nothing(self, now: float) -> bool:
        """Whether a head has begun to come, or the rest of a body that nobody waits for, and no end of it."""
        answered = self.cycle is None or self.cycle.response_complete
        began = self.cycle is None or bool(self.conn.trailing_data[0])
        heads = self.conn.their_state is h11.IDLE and began
        waits = answered and (heads or self.conn.their_state is h11.SEND_BODY)
        self._waits = (self._waits or now) if waits else None
        return self._waits is not None and now - self._waits > self.limits.stall

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read. An answer that has begun is cut off: its client cannot tell the two apart."""
        self._answer(Refused(400, "no valid HTTP request", code="malformed"))

    def _answer(self, error: Refused) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.refused(error.status, error.code)
            body = json.dumps(error.body()).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            headers += [(b"retry-after", b"1")] if error.retry_after else []
            start = h11.Response(status_code=error.status, headers=[*headers, (b"connection", b"close")])
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
