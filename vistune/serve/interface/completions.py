"""The life of an answer on the event loop: handed in, heard piece by piece, left when its asker goes.

Knows HTTP's streams and the engine's words; nothing of how a request is read.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vistune.serve.answering.lane import Ticket
from vistune.serve.interface.wording import WAITING, Wording, event
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics
from vistune.serve.refused import Refused
from vistune.serve.shelf import Served
from vistune.serve.work import Ended, Piece, Work

HELD_BACK = 5.0
"""Seconds in which a stream's status waits for the model's first word, so that a failure has a status of its own."""
ALIVE = 10.0
"""Seconds of silence after which a stream says that it is still there: proxies close what is silent for 30 or 60."""
GRACE = 10.0
"""Seconds after its deadline at which an answer that an engine has forgotten is given up."""
THREADS = 8

T = TypeVar("T")


class Gone(Exception):
    """The asker has closed the connection."""


class _Post:
    """What engines say, on its way to a loop: all that is said in a step of theirs wakes it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)
        self._waiting: deque[tuple[Answer, float, Piece | Ended]] = deque()
        self._called = False

    def put(self, one: Answer, when: float, said: Piece | Ended) -> None:
        """From any thread. RuntimeError when the loop is closed."""
        self._waiting.append((one, when, said))
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("the loop is closed")
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # first, so that what comes from now on calls again
        while self._waiting:
            one, when, said = self._waiting.popleft()
            one.take(when, said)


_posts: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = weakref.WeakKeyDictionary()


def _post(loop: asyncio.AbstractEventLoop) -> _Post:
    if loop not in _posts:
        _posts[loop] = _Post(loop)
    return _posts[loop]


class Answer:
    """A request that an engine has taken. Made on the event loop; `close` it, or use it in `with`: whoever does not
    hear it to its end leaves. Refused: as by `Engine.submit`."""

    def __init__(self, served: Served, work: Work, metrics: Metrics, came: float | None = None):
        """`came`: when the request did, on `time.monotonic()`."""
        self.name, self.prompt_tokens, self.metrics = served.name, len(work.ids), metrics
        self.came = self._last = time.monotonic() if came is None else came
        self.tokens = 0
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._post = _post(self._loop)
        self._heard: deque[tuple[float, Piece | Ended]] = deque()
        self._there = asyncio.Event()
        self._ticket: Ticket | None = None  # an engine may speak before it hands over the ticket
        self._ticket = served.engine.submit(work, self._hear)
        metrics.began(self.name)
        self._late = self._at(work.until + GRACE)

    def _at(self, when: float) -> asyncio.TimerHandle | None:
        if math.isinf(when):
            return None
        late = Ended(reason="error", error=Refused(504, "the answer was not ready in time", code="deadline"))
        return self._loop.call_later(max(when - time.monotonic(), 0), self.take, when, late)

    def _hear(self, said: Piece | Ended) -> None:
        """In the engine's thread."""
        try:
            self._post.put(self, time.monotonic(), said)
        except RuntimeError:  # the loop is closed, so nobody is there to hear it
            self._leave()

    def _leave(self) -> None:
        if self._ticket is not None:
            self._ticket.leave()

    def take(self, when: float, said: Piece | Ended) -> None:
        """On the loop: this was said, then."""
        self._heard.append((when, said))
        self._there.set()

    async def next(self, seconds: float | None = None) -> Piece | Ended | None:
        """What is said next, several pieces as one where they have come meanwhile; None when nothing is within so many
        seconds."""
        if not self._heard:
            try:
                async with asyncio.timeout(seconds):
                    await self._there.wait()
            except TimeoutError:
                return None
        text = ""
        while self._heard:
            when, said = self._heard.popleft()
            if isinstance(said, Ended):
                if text:  # first what was said before
                    self._heard.appendleft((when, said))
                    return Piece(text, self.tokens)
                self._end(said.reason, said.tokens)
                return said
            text += said.text
            self._count(when, said.tokens)
        self._there.clear()
        return Piece(text, self.tokens)

    def _count(self, when: float, tokens: int) -> None:
        new = tokens - self.tokens
        if new > 0:
            gaps = new if self.tokens else new - 1
            if not self.tokens:
                self.metrics.first(self.name, when - self.came)
            for _ in range(gaps):
                self.metrics.gap(self.name, max(when - self._last, 0) / new)
            self.tokens, self._last = tokens, when

    def _end(self, reason: str, tokens: int) -> None:
        if not self._ended:
            self._ended = True
            if self._late is not None:
                self._late.cancel()
            seconds = time.monotonic() - self.came
            self.metrics.ended(self.name, reason, self.prompt_tokens, max(tokens, self.tokens), seconds)

    def close(self) -> None:
        """Leave, unless it has ended. May be called again."""
        self._leave()
        self._end("left", self.tokens)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def answer(
    served: Served, work: Work, metrics: Metrics, came: float | None = None
) -> AsyncGenerator[Piece | Ended]:
    """Pieces of an answer and its `Ended`. Closing it (`contextlib.aclosing`) or cancelling who waits for it leaves.
    Refused: as by `Engine.submit`, at the first piece."""
    with Answer(served, work, metrics, came) as one:
        while True:
            said = await one.next()
            if said is not None:
                yield said
            if isinstance(said, Ended):
                return


class Desk:
    """Where requests are made ready, in threads, when there is room for them. One for a server."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "preparing")
        self._coming: Counter[str] = Counter()

    @contextmanager
    def place(self, served: Served) -> Iterator[None]:
        """For a request that is being made ready. Refused: 429 when an engine has no room for it, so that no picture is
        decoded in vain, 503 when it is dead."""
        state, name = served.engine.state(), served.engine.name
        if not state.alive:
            raise Refused(503, "this model does not answer any more", code="engine_dead")
        free = max(self.limits.rows - state.running, 0)
        if state.waiting + self._coming[name] >= self.limits.queue + free:
            raise Refused(429, "too many requests wait already; come again", code="queue_full", retry_after=1.0)
        self._coming[name] += 1
        try:
            yield
        finally:
            self._coming[name] -= 1

    async def do(self, make: Callable[[threading.Event], T]) -> T:
        """What `make` gives, in a thread; its event is set when nobody waits for it any more."""
        told = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, make, told)
        except asyncio.CancelledError:
            told.set()
            raise


async def gone(receive: Receive) -> None:
    """Returns when the asker has closed the connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, doing: Awaitable[T]) -> T:
    """What `doing` gives; it is cancelled, and Gone is raised, when the asker goes."""
    work, left = asyncio.ensure_future(doing), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Gone
    finally:
        for one in (work, left):
            one.cancel()
        await asyncio.wait({work, left})


class Events(Response):
    """A stream of events, sent as they come; `left` is called at its end, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], left: Callable[[], None]):
        self.status_code, self.background = 200, None
        self.events, self.left = events, left
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except (Gone, OSError):
            return
        finally:
            self.left()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for one in self.events:
            await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def respond(request: Request, one: Answer, words: Wording, *, stream: bool) -> Response:
    """The answer as HTTP gives it; a stream's status waits for the first word. Raises Gone, and Refused for what went
    wrong before anything was sent. `one` is closed at the end."""
    try:
        if not stream:
            return await unless_gone(request.receive, _whole(one, words))
        said = await unless_gone(request.receive, one.next(HELD_BACK))
        if isinstance(said, Ended):
            _check(said)
        return Events(_events(one, said, words), one.close)
    except BaseException:
        one.close()
        raise


async def _whole(one: Answer, words: Wording) -> JSONResponse:
    text = ""
    while not isinstance(said := await one.next(), Ended):
        text += said.text if said else ""
    _check(said)
    whole = words.whole(text, said, one.prompt_tokens)
    return JSONResponse(whole, headers={"Cache-Control": "no-store"})


async def _events(one: Answer, said: Piece | Ended | None, words: Wording) -> AsyncIterator[bytes]:
    """The answer, whose first word is `said`. What fails now is an event, and the stream is not called done."""
    yield words.role()
    while not isinstance(said, Ended):
        if said is None:
            yield WAITING
        elif said.text:
            yield words.more(said.text)
        said = await one.next(ALIVE)
    if (why := failure(said)) is not None:
        yield event(why.body())
    else:
        yield words.end(said, one.prompt_tokens)


def _check(said: Ended) -> None:
    if (why := failure(said)) is not None:
        raise why


def failure(said: Ended) -> Refused | None:
    """Why an answer was not finished."""
    if said.error is None and said.reason not in ("stop", "length"):
        return Refused(503, "the answer was broken off", code="stopped")
    return said.error
