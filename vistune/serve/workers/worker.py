"""One worker as requests see it: where it listens, whether it is ready, how many it is answering.

Knows nothing of processes, nor of what is asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CONNECT = 10.0
"""Seconds in which a server that is there takes a connection on a Unix socket; after more its loop stands still."""
WORTH = 16
"""Pieces of a beginning (`alike`), 8 KB, for which a worker is asked that is a little busier than others."""


class Body(httpx.AsyncByteStream):
    """What is sent, in a place of its own: an answer's objects hold it to their end, and it may be let go of before."""

    def __init__(self, data: bytes = b""):
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data:
            yield self.data


class Worker:
    """A server on a Unix socket at `place`. Connections are not kept: a Unix one costs nothing, and one that the other
    side has just closed can then not be used again."""

    def __init__(self, number: int, place: Path):
        self.number, self.place = number, place
        self.ready = False
        self.busy = 0
        """Requests that it has now."""
        self.state = "starting"
        self.starts = 0
        none_kept = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(place), limits=none_kept, verify=False), trust_env=False
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def send(
        self,
        method: str,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        body: Body | None = None,
        read: float | None = None,
    ) -> httpx.Response:
        """Its answer, begun; whoever asked closes it. `read`: seconds for which it may be silent, for ever unless said:
        it has deadlines of its own. httpx.HTTPError."""
        waits = {"connect": CONNECT, "read": read, "write": None, "pool": None}
        extensions: dict[str, Any] = {"timeout": waits, "target": target}
        request = httpx.Request(method, "http://worker/", headers=headers, stream=body or Body(), extensions=extensions)
        return await self._client.send(request, stream=True)

    async def get(self, path: str, seconds: float) -> httpx.Response:
        """The whole answer to a small question of the front's own. httpx.HTTPError."""
        answer = await self.send("GET", path.encode(), [(b"host", b"localhost")], read=seconds)
        try:
            await answer.aread()
        finally:
            await answer.aclose()
        return answer

    async def close(self) -> None:
        await self._client.aclose()


def chosen(workers: list[Worker], turn: int, tried: list[Worker], known: Mapping[int, int]) -> Worker | None:
    """The ready one with the fewest requests, those that were `tried` left out. Of equals the one that was given the
    most of this beginning, by its number; it is worth a request or some when that is a picture or a long talk. Else
    they take turns."""
    count = len(workers)
    free = [one for one in workers if one.ready and one not in tried]
    more = 1 + min((one.busy for one in free), default=0) // 4

    def order(one: Worker) -> tuple[int, int, int]:
        pieces = known.get(one.number, 0)
        return one.busy - more * (pieces >= WORTH), -pieces, (one.number - turn) % count

    return min(free, key=order, default=None)
