"""The addresses of the chat page: itself, its files, what it has to know of the server, and where votes go.

Knows nothing of models: the page asks `v1/chat/completions` as everybody does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vistune import __version__
from vistune.serve.limits import Limits
from vistune.serve.page import HEADERS, HTML, at, file, files, sent, written
from vistune.serve.page.votes import Votes, read_vote
from vistune.serve.refused import Refused


def router(limits: Limits, votes: Path | None = None, *, name: str = "vistune") -> APIRouter:
    """The page at `/`, its files under `/page/`, and `/votes`: without a file `votes` there is no voting.

    `name` is what the page is headed with. Addresses in it are relative, or begin with the server's `--root-path`: the
    page is then right without the slash at the end of its own address too. Raises OSError where votes cannot be kept.
    """
    there, index = files(), written("index.html")
    known = {"name": name, "version": __version__, "votes": votes is not None, "limits": _limits(limits)}
    kept = Votes(votes) if votes else None
    made = APIRouter(include_in_schema=False)

    @made.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        text = at(index, request.scope.get("root_path", ""))
        return sent(request, file(text.encode(), HTML))

    @made.get("/page/settings")
    async def settings() -> Response:
        return JSONResponse(known, headers=HEADERS)

    @made.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        if name not in there:
            raise Refused(404, "the page has no such file", code="not_found")
        return sent(request, there[name])

    @made.post("/votes")
    async def vote(request: Request) -> Response:
        if kept is None:
            raise Refused(404, "votes are not kept here: start the server with --votes FILE", code="votes_off")
        line = (await read_vote(request)).line(_asker(request))
        await run_in_threadpool(kept.add, line)
        return JSONResponse({"tstamp": line["tstamp"]}, headers={"Cache-Control": "no-store"})

    return made


def _asker(request: Request) -> str:
    """The address that a vote comes from. Over a Unix socket, where no stranger connects, the process in front says."""
    forwarded = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return request.client.host if request.client else forwarded[:64]


def _limits(limits: Limits) -> Mapping[str, Any]:
    """What the page holds itself to, so that a picture too large is shrunk and not refused."""
    names = ("body", "messages", "pictures", "picture_bytes", "picture_pixels", "new_tokens", "new_tokens_unasked")
    return {name: getattr(limits, name) for name in names}
