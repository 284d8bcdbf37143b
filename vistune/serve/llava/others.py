"""Other workers, as a controller speaks to them: how they are, and answers of theirs passed on.

Knows addresses that were checked, and nothing of who is chosen.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
from starlette.requests import Request
from starlette.responses import Response

from vistune.serve.interface.completions import Events, unless_gone
from vistune.serve.llava import lines
from vistune.serve.llava.answering import refused
from vistune.serve.llava.status import Status, read_status
from vistune.serve.refused import Refused

STATUS = 5.0
"""Seconds in which a worker says how it is."""
MOST_STATUS = 1 << 20
HOPS = "x-vistune-hops"
MOST_HOPS = 4
"""Controllers may stand above each other; one that was registered with itself would ask itself for ever."""


class Others:
    """`seconds`: how long a worker may be silent in an answer. No redirect is followed: it would lead where nobody has
    allowed."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._client = httpx.AsyncClient(trust_env=False, follow_redirects=False)

    async def status(self, address: str) -> Status:
        """What the worker says of itself. Refused: 400, it does not answer, or says nothing that can be used."""
        said = b""
        try:
            async with self._client.stream("POST", f"{address}/worker_get_status", timeout=STATUS) as answer:
                async for piece in answer.aiter_bytes():
                    said += piece
                    if len(said) > MOST_STATUS:
                        break
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            return read_status(json.loads(said))
        except (httpx.HTTPError, ValueError, RecursionError) as error:  # Refused is one
            why = f"no worker says how it is at {address}: {_named(error)}"
            raise Refused(400, why, param="worker_name", code="worker_silent") from None

    async def respond(self, request: Request, body: bytes, address: str) -> Response:
        """The worker's answer as it comes. Raises Gone."""
        hops = int(found) if (found := request.headers.get(HOPS, "0")).isdigit() else MOST_HOPS
        if hops >= MOST_HOPS:
            return refused(Refused(508, "this worker was registered with itself", code="loop"), lines.NO_WORKER)
        sent = self._client.build_request(
            "POST",
            f"{address}/worker_generate_stream",
            content=body,
            headers={"content-type": "application/json", "user-agent": "LLaVA Client", HOPS: str(hops + 1)},
            timeout=httpx.Timeout(self._seconds, connect=STATUS),
        )
        try:
            answer = await unless_gone(request.receive, self._client.send(sent, stream=True))
        except httpx.HTTPError as error:
            return refused(
                Refused(502, f"the worker does not answer: {_named(error)}", code="worker_silent"), lines.LOST
            )
        passed = _Passed(_lines(answer), lambda: None)
        passed.status_code = answer.status_code
        return passed


class _Passed(Events):
    media_type = lines.TYPE


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The worker's own lines; one that was cut off is ended before the reason is said."""
    whole = True
    try:
        async for piece in answer.aiter_bytes():
            whole = piece.endswith(b"\0")
            yield piece
    except httpx.HTTPError as error:
        cut = b"" if whole else b"\0"
        yield cut + lines.line(f"the worker's answer broke off: {_named(error)}", lines.LOST)
    finally:
        await answer.aclose()


def _named(error: Exception) -> str:
    """In our own words: an error's may repeat what a worker said."""
    if isinstance(error, json.JSONDecodeError) or not isinstance(error, ValueError):
        return type(error).__name__
    return str(error)
