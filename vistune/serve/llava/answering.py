"""One answer for a client of LLaVA's: its prompt as the engine takes it, and what is said as the reference's lines.

Knows nothing of controllers.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vistune.serve.interface.completions import Answer, Desk, Events, Gone, failure, unless_gone
from vistune.serve.interface.preparing import Order, prepare_prompt
from vistune.serve.limits import Limits
from vistune.serve.llava import lines
from vistune.serve.llava.asked import Asked, read
from vistune.serve.metrics import Metrics
from vistune.serve.pictures.media import Media, Taken
from vistune.serve.refused import Refused
from vistune.serve.shelf import Served, Shelf
from vistune.serve.work import Ended, Piece, Work

SILENT = 3.0
"""Seconds after which what has been said is said again: the reference's controller gives up after five without a byte,
its page after ten."""
PACE = 0.1
"""Seconds between lines at least, what is said meanwhile being one: the reference's page takes some 30 ms for each, and
would still be showing an answer long after its end."""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Lines(Events):
    """A stream of them."""

    media_type = lines.TYPE


@dataclass(frozen=True)
class Answering:
    """What it takes to answer."""

    shelf: Shelf
    limits: Limits
    metrics: Metrics
    media: Media
    desk: Desk

    async def respond(self, request: Request, body: list[bytes], served: Served) -> Response:
        """The answer to a request whose body is in `body`, and is taken out of it. What goes wrong is said in the
        protocol's own words, with the reason, under HTTP's status for it."""
        came, asked = time.monotonic(), None
        try:
            asked = await asyncio.to_thread(read, body.pop())
            work = await unless_gone(request.receive, self._ready(asked, served, came))
            return await _streamed(request, asked.prompt, Answer(served, work, self.metrics, came))
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Refused as why:
            if asked is not None and why.code == "context_length_exceeded":
                return Response(lines.line(asked.prompt + lines.TOO_LONG), headers=HEADERS, media_type=lines.TYPE)
            self.metrics.refused(why.status, why.code)
            return refused(why)

    async def _ready(self, asked: Asked, served: Served, came: float) -> Work:
        asked.check_marks()
        settings = asked.settings(self.limits.new_tokens, secrets.randbits(63))
        if settings.max_new_tokens < 1:
            raise Refused(400, "no tokens are asked for", param="max_new_tokens", code="context_length_exceeded")
        params = tuple(f"images[{number}]" for number in range(len(asked.images)))
        order = Order(
            settings=settings,
            stops=tuple(asked.stop),
            adapter=served.adapter,
            until=came + self.limits.deadline,
            context=served.engine.context,
            fits=True,
            params=params,
            timed=self.metrics.picture,
        )
        with self.desk.place(served):
            try:
                async with asyncio.timeout(self.limits.deadline):
                    taken = await self.media.read(list(zip(params, asked.images, strict=True)))
                    return await self.desk.do(functools.partial(_prepared, served, asked.prompt, taken, order))
            except TimeoutError:
                raise Refused(504, "making the request ready took too long", code="deadline") from None


def _prepared(served: Served, prompt: str, taken: list[Taken], order: Order, told: threading.Event) -> Work:
    return prepare_prompt(served.engine.loaded, prompt, taken, replace(order, told=told))


async def _streamed(request: Request, prompt: str, one: Answer) -> Response:
    """The stream, once there is a word or some time has gone by. `one` is closed at its end, or here."""
    try:
        said = await unless_gone(request.receive, one.next(SILENT))
        if isinstance(said, Ended) and (why := failure(said)):
            raise why
        return Lines(_lines(prompt, one, said), one.close)
    except BaseException:
        one.close()
        raise


async def _lines(prompt: str, one: Answer, said: Piece | Ended | None) -> AsyncIterator[bytes]:
    """The answer, whose first word is `said`. What fails now is the last line, with its reason."""
    text = prompt
    while not isinstance(said, Ended):
        text += said.text if said else ""
        yield lines.line(text)
        due = time.monotonic() + PACE
        said = await one.next(SILENT)
        while isinstance(said, Piece) and (left := due - time.monotonic()) > 0:
            text += said.text
            said = await one.next(left)
    why = failure(said)
    yield lines.line(why.message, lines.FAILED) if why else lines.line(text)


def refused(why: Refused, code: int = lines.FAILED) -> Response:
    """A refusal in the protocol's words."""
    more = {"Retry-After": str(max(1, round(why.retry_after)))} if why.retry_after else {}
    return Response(lines.line(why.message, code), why.status, {**HEADERS, **more}, media_type=lines.TYPE)
