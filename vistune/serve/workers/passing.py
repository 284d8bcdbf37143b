"""A request passed to a worker, one that knows how it begins or the least busy, and its answer passed back as it comes.

Knows nothing of what is asked: bytes in, bytes out, and how an answer that breaks off is ended so that clients see it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import httpx

from vistune import console
from vistune.serve.refused import Refused
from vistune.serve.workers.alike import Alike
from vistune.serve.workers.asked import HOP, Asked, Send
from vistune.serve.workers.worker import Worker, chosen

AGAIN = {429, 503}
"""What a worker says that has no room, or is ending; another may have some."""
DIED = "the worker that was answering has died; ask again"
LLAVA_STREAM = "/worker_generate_stream"


class Passing:
    """Requests to workers, one at a time or many."""

    def __init__(self, workers: Sequence[Worker]):
        self.workers = list(workers)
        self.turn = 0
        self.alike = Alike()

    async def one(self, asked: Asked, send: Send) -> None:
        """Refused: 503 when no worker is there, 502 when the one that was asked died before it answered. It is not
        asked again elsewhere then: what has killed one worker would kill them all."""
        tried: list[Worker] = []
        known = self.alike.known(asked.body.data)
        while worker := chosen(self.workers, self.turn, tried, known):
            self.turn = worker.number + 1
            tried.append(worker)
            self.alike.give(asked.body.data, worker.number)
            with worker.at_work():
                if await self._answered(worker, asked, send, tried):
                    return
        raise Refused(503, "no worker is ready; ask again", code="no_worker", retry_after=2.0)

    async def _answered(self, worker: Worker, asked: Asked, send: Send, tried: list[Worker]) -> bool:
        """Whether the client has its answer; False when another worker shall be tried."""
        try:
            answer = await worker.send(asked.method, asked.target, asked.onward(), asked.body)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return False  # nothing has reached it
        except httpx.HTTPError as error:
            raise Refused(502, DIED, code="worker_died") from error
        try:
            if answer.status_code in AGAIN and chosen(self.workers, self.turn, tried, {}):
                return False
            asked.body.data = b""  # an answer may take minutes, and a question hold pictures
            await relay(answer, asked, send)
            return True
        finally:
            await answer.aclose()

    async def all(self, asked: Asked, send: Send) -> None:
        """What every worker has to know: told to each, answered with the first refusal, or with the first "no"."""
        there = [one for one in self.workers if one.ready]
        found = await asyncio.gather(*(_whole(one, asked) for one in there), return_exceptions=True)
        for worker, one in zip(there, found, strict=True):
            if isinstance(one, httpx.HTTPError):
                console.warn(f"worker {worker.number}: {type(one).__name__}")
            elif isinstance(one, BaseException):
                raise one
        answers = [one for one in found if isinstance(one, httpx.Response)]
        if not answers:
            raise Refused(503, "no worker is ready; ask again", code="no_worker", retry_after=2.0)
        worst = max(answers, key=lambda one: (one.status_code, b"false" in one.content[:64]))
        await relay(worst, asked, send)


async def _whole(worker: Worker, asked: Asked) -> httpx.Response:
    with worker.at_work():
        answer = await worker.send(asked.method, asked.target, asked.onward(), asked.body, read=30.0)
        try:
            await answer.aread()
        finally:
            await answer.aclose()
        return answer


async def relay(answer: httpx.Response, asked: Asked, send: Send) -> None:
    """Status, headers and pieces as they come. Where the client is slow, so is `send`, and the worker waits for us."""
    dropped = HOP | {b"date", b"server"}
    headers = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in dropped]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    if answer.is_stream_consumed:
        await send({"type": "http.response.body", "body": answer.content})
        return
    try:
        async for piece in answer.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx.HTTPError:
        last = _broken(answer, asked)
        if last is None:
            raise Cut from None
        await send({"type": "http.response.body", "body": last, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class Cut(Exception):
    """An answer broke off in the middle, and its kind has no way to say so: the connection has to be closed."""


def _broken(answer: httpx.Response, asked: Asked) -> bytes | None:
    """The last words of an answer that breaks off, in its own language; None where it has none."""
    if asked.path == LLAVA_STREAM:
        return b"\0" + json.dumps({"text": DIED, "error_code": 3}).encode() + b"\0"
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        said = Refused(502, DIED, code="worker_died").body()
        return b"\n\ndata: " + json.dumps(said).encode() + b"\n\n"  # an event that was cut off ends before it
    return None
